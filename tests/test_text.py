import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flowdata.scoring.collate import pad_collate
from flowdata.scoring.plan.lengths import sample_lengths
from flowdata.text.formats import Fields, find_fields
from flowdata.text.tokens import tokenize_rows

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIR = Fields(prompt="prompt", completion="completion")


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    vocabulary = {chr(code): code - 9 for code in range(10, 127)} | {"\n": 1, "</s>": 0}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    base.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", unk_token="?")
    fast.chat_template = TEMPLATE
    return fast


def texts(sample, tokenizer):
    """(all text, target text) of a sample."""
    is_target = sample["labels"] != -100
    assert torch.equal(sample["labels"][is_target], sample["input_ids"][is_target])
    join = "".join
    every = tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())
    return join(every), join(
        t for t, target in zip(every, is_target.tolist(), strict=True) if target
    )


def test_completions_are_the_targets(tokenizer):
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "ok"}]
    samples = tokenize_rows(rows, tokenizer, PAIR, template=False)
    assert texts(samples[0], tokenizer) == ("2+2=4</s>", "4</s>")
    assert texts(samples[-1], tokenizer) == ("ok</s>", "ok</s>")
    assert samples.lengths.tolist() == [6, 3]
    with pytest.raises(IndexError):
        samples[2]


def test_pairs_go_through_the_chat_template(tokenizer):
    rows = [{"prompt": "hi", "completion": "yo"}]
    samples = tokenize_rows(rows, tokenizer, PAIR, template=True)
    assert texts(samples[0], tokenizer) == ("<user>hi</s>\n<assistant>yo</s>\n", "yo</s>")


def test_every_reply_of_a_chat_is_a_target(tokenizer):
    chat = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]}]
    samples = tokenize_rows(rows, tokenizer, Fields(messages="messages"), template=False)
    whole, targets = texts(samples[0], tokenizer)
    assert whole == tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert targets == "b</s>d</s>"


def test_long_samples_are_cut_and_counted(tokenizer):
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (1, 5, 9)]
    samples = tokenize_rows(rows, tokenizer, PAIR, template=False, max_length=6)
    assert samples.num_cut == 2
    assert samples.lengths.tolist() == [4, 6, 6]
    other = tokenize_rows(rows, tokenizer, PAIR, template=False, max_length=7)
    assert samples.digest() != other.digest()


def test_rows_that_all_lost_their_targets_are_told_of(tokenizer, caplog):
    rows = [{"prompt": "long " * 9, "completion": "short"}, {"prompt": "", "completion": "x"}]
    tokenize_rows(rows, tokenizer, template=False, max_length=4)
    assert caplog.text == ""
    tokenize_rows(rows[:1], tokenizer, template=False, max_length=4)
    assert "no sample has a target left" in caplog.text
    assert "max_length=4; take a greater length, or truncation='keep_end'" in caplog.text


def test_fields_are_found_by_name():
    assert find_fields({"question": "", "answer": ""}, Fields()).completion == "answer"
    assert find_fields({"messages": []}, Fields()).messages == "messages"
    assert find_fields({"text": ""}, Fields()) == Fields(completion="text")
    named = Fields(prompt="p", completion="c")
    assert find_fields({"p": "", "c": "", "text": ""}, named) == named
    with pytest.raises(ValueError, match="column 'c' is missing; there are 'p', 'q'"):
        find_fields({"p": "", "q": ""}, named)
    with pytest.raises(ValueError, match="no known text columns among 'x'"):
        find_fields({"x": ""}, Fields())
    with pytest.raises(ValueError, match="needs a completion column"):
        find_fields({"p": ""}, Fields(prompt="p"))


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"prompt": "a"}, PAIR, "row 1: column 'completion' should hold text, it holds nothing"),
        (
            {"prompt": 3, "completion": "b"},
            PAIR,
            "row 1: column 'prompt' should hold text, it holds",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            Fields(messages="messages"),
            "row 1: the chat has no message with role 'assistant'",
        ),
    ],
)
def test_rows_that_can_not_be_read_are_named(tokenizer, row, columns, message):
    good = {
        "prompt": "a",
        "completion": "b",
        "messages": [{"role": "assistant", "content": "b"}],
    }
    with pytest.raises(ValueError, match=message):
        tokenize_rows([good, row], tokenizer, columns, template=False)


def test_templates_that_can_not_be_cut_or_are_not_there_are_refused(tokenizer):
    from copy import deepcopy

    odd = deepcopy(tokenizer)
    odd.chat_template = "{{ messages | length }}" + TEMPLATE
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    with pytest.raises(ValueError, match="give each reply a row of its own"):
        tokenize_rows([{"m": chat}], odd, Fields(messages="m"), template=False)
    odd.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        tokenize_rows([{"prompt": "a", "completion": "b"}], odd, PAIR, template=True)


def test_lengths_are_read_off_whatever_has_them():
    import datasets

    samples = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [5, 6]}]
    for data in (samples, datasets.Dataset.from_list(samples)):
        assert sample_lengths(data).tolist() == [3, 3]
    assert sample_lengths([(torch.ones(3), 1)]) is None
    assert sample_lengths(samples, [7, 8]).tolist() == [7, 8]
    assert sample_lengths(["x" * 30, {"a": "x" * 9, "b": "x" * 9, "c": 3}]).tolist() == [11, 7]


def test_padding_is_on_the_right():
    batch = pad_collate(
        [
            {"input_ids": [5, 6], "labels": [-100, 6], "name": "a", "n": 1},
            {"input_ids": [7], "labels": [7], "name": "b", "n": 2},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["labels"].tolist() == [[-100, 6], [7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["name"] == ["a", "b"]
    assert batch["n"].tolist() == [1, 2]


def test_the_room_offers_what_examples_use():
    import flowdata.text

    for name in flowdata.text.__all__:
        assert getattr(flowdata.text, name).__doc__


def test_rows_that_can_not_be_read_have_empty_samples_that_raise(tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c"}, {"prompt": "d", "completion": ""}]
    rows = [*rows, {"prompt": 1}, {"prompt": "e", "completion": "f"}]
    samples = tokenize_rows(rows, tokenizer, PAIR, template=False, on_error="skip")
    assert samples.lengths.tolist() == [3, 0, 2, 0, 3]
    with pytest.raises(ValueError, match="row 3: column 'completion' should hold text"):
        samples[-2]
    readable = samples.readable()
    assert [texts(readable[n], tokenizer)[0] for n in range(3)] == ["ab</s>", "d</s>", "ef</s>"]
    part = samples.part(2, 5)
    assert part.lengths.tolist() == [2, 0, 3]
    assert torch.equal(part[2]["input_ids"], samples[4]["input_ids"])
    with pytest.raises(ValueError, match="row 3: "):
        part[1]
    assert samples.part(0, 5).digest() == samples.digest()


def test_tokens_of_samples_lie_one_after_another(tokenizer):
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "", "completion": "de"}]
    samples = tokenize_rows(rows, tokenizer, PAIR, template=False)
    assert samples.offsets.tolist() == [0, 4, 7]
    assert samples.offsets.dtype == "int64"
    assert samples.is_target.tolist() == [False, False, True, True, True, True, True]
    assert samples.digest() == "6c6185261b1dbec430ee296a41e45ca3fdab7206b58d1f2606dfb8d74cb3238b"
