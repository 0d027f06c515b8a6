"""Bundle to engine: device profiles, fit, predictions, and the targets that build. Nothing heavy is imported here."""
