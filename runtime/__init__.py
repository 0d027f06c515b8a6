"""Engine to tokens: load, generate, measure. Nothing heavy is imported until a name's own module is."""
