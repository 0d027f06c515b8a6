"""Tokens to text by whole characters, stop texts that span tokens, what goes before a text, chat templates."""

from __future__ import annotations

import json

import fake_engine
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedge.errors import EngineError, UsageError
from moedge.runtime.tokens import StopMatcher, StreamDecoder, Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_tokenizer")
    fake_engine.write_tokenizer(folder)
    return Tokenizer(folder)


@pytest.fixture(scope="session")
def fallback_tokenizer(tmp_path_factory):
    """As Llama and Mixtral have it: words begin with a mark, unknown characters fall back to byte tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁b", "a"]
    model = models.BPE({word: place for place, word in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True)
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    folder = tmp_path_factory.mktemp("fallback_tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


def stream(tokenizer, ids, context=(), whole=True):
    decoder = StreamDecoder(tokenizer, context, whole=whole)
    pieces = [decoder.push(token) for token in ids]
    return [*pieces, decoder.finish()]


def test_a_character_split_over_tokens_comes_whole(byte_tokenizer):
    assert stream(byte_tokenizer, "é€😀x".encode()) == ["", "é", "", "", "€", "", "", "", "😀", "x", ""]


def test_an_unfinished_character_reads_as_replacement_at_the_end(byte_tokenizer):
    assert stream(byte_tokenizer, "a€".encode()[:-1]) == ["a", "", "", "\ufffd"]


def test_broken_bytes_do_not_hold_text_back_for_ever(byte_tokenizer):
    pieces = stream(byte_tokenizer, [0xFF] * 200)
    assert any(pieces[:100])
    assert "".join(pieces) == "\ufffd" * 200


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_whole(byte_tokenizer, data):
    pieces = stream(byte_tokenizer, data)
    assert "".join(pieces) == byte_tokenizer.decode(list(data)) == data.decode("utf-8", "replace")


@given(st.text(max_size=20), st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_pieces_join_after_a_prompt(fallback_tokenizer, prompt, text):
    context = fallback_tokenizer.encode(prompt)
    ids = fallback_tokenizer.encode(prompt + text)[len(context) :]
    whole = fallback_tokenizer.decode(context + ids)
    known = fallback_tokenizer.decode(context)
    if fallback_tokenizer.encode(prompt + text)[: len(context)] == context and whole.startswith(known):
        assert "".join(stream(fallback_tokenizer, ids, context)) == whole[len(known) :]


def test_a_space_at_the_first_new_token_stays(fallback_tokenizer):
    ids = [fallback_tokenizer.token_id("▁a")]
    assert fallback_tokenizer.decode(ids) == "a"
    assert "".join(stream(fallback_tokenizer, ids, fallback_tokenizer.encode("b"))) == " a"


def test_ids_that_end_inside_a_character_are_completed(byte_tokenizer):
    first, rest = list("€".encode()[:2]), list("€!".encode()[2:])
    assert stream(byte_tokenizer, rest, first, whole=False) == ["€", "!", ""]
    assert stream(byte_tokenizer, list(b"!"), list("x\ufffd".encode())) == ["!", ""]


def test_special_tokens_are_no_text(byte_tokenizer):
    assert "".join(stream(byte_tokenizer, [*b"a", fake_engine.EOS, *b"b"])) == "ab"
    assert byte_tokenizer.decode([*b"a", fake_engine.EOS], skip_special=False) == "a<eos>"


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "stopped"),
    [
        (["END"], ["a E", "N", "D b"], "a ", True),
        (["END"], ["a EN", "d", " E"], "a ENd E", False),
        (["abab"], ["ab", "aab", "ab", "!"], "aba", True),
        (["zz", "b"], ["azz b"], "a", True),
        (["bc", "abcd"], ["a", "b", "c", "d"], "a", True),
        (["\n\n"], ["x\n", "y\n", "\nz"], "x\ny", True),
        ([], ["a", "b"], "ab", False),
    ],
)
def test_stop_texts(stops, pieces, text, stopped):
    matcher = StopMatcher(stops)
    given_out = ""
    for piece in pieces:
        part, found = matcher.push(piece)
        given_out += part
        if found:
            break
    assert (given_out + ("" if found else matcher.finish()), found) == (text, stopped)


def test_text_that_cannot_become_a_stop_is_given_out_at_once():
    matcher = StopMatcher(["<end>"])
    assert matcher.push("a <b") == ("a <b", False)
    assert matcher.push(" <en") == (" ", False)


def test_wrong_stops():
    with pytest.raises(UsageError, match="a stop text must not be empty"):
        StopMatcher(["a", ""])
    with pytest.raises(UsageError, match="stop must be a list of texts, not the text 'END'"):
        StopMatcher("END")


@pytest.mark.parametrize("changes", [{}, {"add_bos_token": False}, {"add_eos_token": True}, {"tokenizer_class": "X"}])
@pytest.mark.parametrize("family", ["LlamaTokenizerFast", "GPTNeoXTokenizerFast", "PreTrainedTokenizerFast"])
def test_ends_are_those_of_transformers(fallback_tokenizer, tmp_path, family, changes):
    import transformers

    folder = fallback_tokenizer._folder
    config = {"tokenizer_class": family, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **changes}
    if config["tokenizer_class"] == "X":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = getattr(transformers, config["tokenizer_class"]).from_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    assert ours.encode("a b") == theirs.encode("a b")
    assert ours.encode("a b", special=False) == theirs.encode("a b", add_special_tokens=False)


TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('only users talk') }}{% endif %}
{{ bos_token }}[{{ message['role'] | upper }}] {{ message['content'] | trim }}{{ eos_token }}
    {%- if loop.index > 8 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{% generation %}[ASSISTANT]{% endgeneration %}{% endif %}
{{ {"é": 1} | tojson }}
"""


def test_chat_template_is_that_of_transformers(fallback_tokenizer, tmp_path):
    from transformers import LlamaTokenizerFast

    (tmp_path / "tokenizer.json").write_text((fallback_tokenizer._folder / "tokenizer.json").read_text())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "ho"}]
    theirs = LlamaTokenizerFast.from_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(messages) == wanted
    with pytest.raises(EngineError, match="chat template of .* refuses these messages: only users talk"):
        ours.chat([{"role": "system", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert Tokenizer(tmp_path).chat(messages) == " hi "


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"])
def test_chat_templates_are_in_a_sandbox(byte_tokenizer, tmp_path, attack):
    fake_engine.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(attack)
    with pytest.raises(EngineError, match="unsafe"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("bug", ["{{ 1 / messages|length * 0 + 1 // 0 }}", "{{ messages[0]['content'].index('y') }}"])
def test_what_a_chat_template_does_not_foresee_is_its_error(byte_tokenizer, tmp_path, bug):
    fake_engine.write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(bug)
    with pytest.raises(EngineError, match="chat template of .* refuses these messages: (integer|substring)"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": "x"}])


def test_missing_tokenizer_and_template(tmp_path):
    with pytest.raises(EngineError, match="has no tokenizer.json: give token ids instead of text, or put"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match="tokenizer.json cannot be read .*; export the bundle again"):
        Tokenizer(tmp_path)
    fake_engine.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(EngineError, match=r"has no chat template \(chat_template.jinja\): generate without chat"):
        Tokenizer(tmp_path).chat([])


def test_text_that_is_no_unicode(byte_tokenizer):
    with pytest.raises(UsageError, match="not valid Unicode: surrogates not allowed at character 1"):
        byte_tokenizer.encode("a\ud800")
    with pytest.raises(UsageError, match="text must be a string, not bytes"):
        byte_tokenizer.encode(b"a")
