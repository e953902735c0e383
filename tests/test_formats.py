"""Formats of rows: the tokens, targets and losses of each are those of a rendering by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flowdata import LossScorer
from flowdata.text import Fields, find_fields, read_rows, tokenize_rows
from flowdata.text.formats import read_conversation, scored_part, unread_columns
from tests.models import tiny_llama

CASES = Path(__file__).parents[2] / "shared" / "cases" / "formats"
TEMPLATE = (
    "{% if documents and opening is defined %}"
    "<docs>{{ opening }}{% for d in documents %}{{ d.text }}{% endfor %}</s>\n{% endif %}"
    "{% if tools %}<tools>{{ tools | tojson }}</s>\n{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SUN = {"name": "sun", "parameters": {"type": "object", "properties": {"day": {"type": "string"}}}}
TOOL = {"type": "function", "function": SUN}
TOOLS = f"<tools>{json.dumps([TOOL])}</s>\n"
CALL = '<call>{"name": "sun", "arguments": {"day": "Monday"}}</call>'
ARGUMENTS = {"day": "Monday"}
CALL_TEXT = json.dumps({"name": "sun", "arguments": ARGUMENTS})


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character, those of the case files among them."""
    characters = "".join(map(chr, range(10, 127))) + "·°¡íñé"
    vocabulary = {character: number + 1 for number, character in enumerate(characters)}
    base = Tokenizer(models.WordLevel(vocabulary | {"</s>": 0, "?": 53}, unk_token="?"))
    base.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", unk_token="?")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def model():
    return tiny_llama().eval()


def by_hand(marked, tokenizer):
    """(tokens, targets) of a rendering whose targets stand between « and »."""
    tokens, targets = [], []
    for number, piece in enumerate(marked.replace("»", "«").split("«")):
        ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        tokens += ids
        targets += [bool(number % 2)] * len(ids)
    return tokens, targets


def check(rows, renderings, tokenizer, model, *, template=True):
    """The rows' tokens, targets and losses are those of renderings by hand."""
    samples = tokenize_rows(rows, tokenizer, find_fields(rows[0]), template=template)
    assert len(samples) == len(renderings)
    scores = LossScorer(model, "causal_lm", dtype="float32", progress=False).score(samples)
    for number, rendering in enumerate(renderings):
        tokens, targets = by_hand(rendering, tokenizer)
        sample = samples[number]
        assert tokenizer.decode(sample["input_ids"]) == tokenizer.decode(tokens)
        assert sample["input_ids"].tolist() == tokens
        assert (sample["labels"] != -100).tolist() == targets
        ids = torch.tensor([tokens])
        labels = ids.masked_fill(~torch.tensor([targets]), -100)
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss)
        assert math.isclose(float(scores.losses[number]), loss, abs_tol=1e-4)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


ROW_AND_RENDERING = {
    "prompt and completion": (
        {"prompt": "hi", "completion": "yo"},
        "<user>hi</s>\n<assistant>«yo</s>»\n",
    ),
    "names in capitals": (
        {"Question": "hi", "Answer": "yo"},
        "<user>hi</s>\n<assistant>«yo</s>»\n",
    ),
    "problem and solution": (
        {"source": "x", "problem": "hi", "solution": "yo", "answer": "y"},
        "<user>hi</s>\n<assistant>«yo</s>»\n",
    ),
    "input and output": ({"input": "hi", "output": "yo"}, "<user>hi</s>\n<assistant>«yo</s>»\n"),
    "OpenOrca": (
        {"id": "1", "system_prompt": "s", "question": "hi", "response": "yo"},
        "<system>s</s>\n<user>hi</s>\n<assistant>«yo</s>»\n",
    ),
    "Alpaca": (
        {"instruction": "hi", "input": "you", "output": "yo"},
        "<user>hi\nyou</s>\n<assistant>«yo</s>»\n",
    ),
    "Alpaca with all": (
        {
            "instruction": "hi",
            "input": "",
            "output": "yo",
            "system": "s",
            "history": [["a", "b"], ["c", "d"]],
        },
        "<system>s</s>\n<user>a</s>\n<assistant>«b</s>»\n<user>c</s>\n<assistant>«d</s>»\n"
        "<user>hi</s>\n<assistant>«yo</s>»\n",
    ),
    "Dolly": (
        {"instruction": "hi", "context": "you", "response": "yo", "category": "open_qa"},
        "<user>hi\nyou</s>\n<assistant>«yo</s>»\n",
    ),
    "SQL with context": (
        {"question": "how many?", "context": "CREATE TABLE t", "answer": "SELECT 1"},
        "<user>how many?\nCREATE TABLE t</s>\n<assistant>«SELECT 1</s>»\n",
    ),
    "ms-swift, history as text": (
        {"query": "c", "response": "d", "history": "[['a', 'b']]"},
        "<user>a</s>\n<assistant>«b</s>»\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
    "ms-swift, pairs": (
        {"system": "s", "conversation": [{"human": "a", "assistant": "b"}]},
        "<system>s</s>\n<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "ms-swift, calls": (
        {
            "messages": [
                *chat(("user", "a"), ("assistant", "let me see")),
                {
                    "role": "tool_call",
                    "content": CALL_TEXT,
                },
                {"role": "tool_response", "content": "no"},
                {"role": "assistant", "content": "b", "loss": False},
            ],
            "tools": json.dumps([TOOL]),
        },
        f"{TOOLS}<user>a</s>\n<assistant>«let me see{CALL}</s>»\n<tool>no</s>\n<assistant>b</s>\n",
    ),
    "LIMA, texts in turn": (
        {"conversations": ["a", "b", "c", "d"], "source": "x"},
        "<user>a</s>\n<assistant>«b</s>»\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {
                    "from": "function_call",
                    "value": CALL_TEXT,
                },
                {"from": "observation", "value": "no"},
                {"from": "gpt", "value": "b"},
            ],
            "system": "s",
            "tools": json.dumps([SUN]),
        },
        f"{TOOLS}<system>s</s>\n<user>a</s>\n<assistant>«{CALL}</s>»\n<tool>no</s>\n"
        "<assistant>«b</s>»\n",
    ),
    "pairs with weights": (
        {
            "conversation": [
                {"human": "a", "assistant": "b", "weight": 0},
                {"human": "c", "assistant": "d", "weight": 1},
            ]
        },
        "<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
    "content by another name": (
        {"chat": [{"role": "User", "text": "a"}, {"role": "Assistant", "text": "b"}]},
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "reasoning before a call": (
        {
            "messages": [
                *chat(("user", "a")),
                {"role": "assistant", "content": "see", "reasoning": "t"},
                {"role": "tool_call", "content": CALL_TEXT, "reasoning": "u"},
                *chat(("tool", "no"), ("assistant", "b")),
            ]
        },
        f"<user>a</s>\n<assistant>«<think>tu</think>see{CALL}</s>»\n<tool>no</s>\n"
        "<assistant>«b</s>»\n",
    ),
    "chat as JSON text": (
        {"messages": json.dumps(chat(("user", "a"), ("assistant", "b")))},
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "object of lists": (
        {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "UltraChat": (
        {"prompt": "a", "prompt_id": "1", "messages": chat(("user", "a"), ("assistant", "b"))},
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "Capybara": (
        {"source": "x", "conversation": [{"input": "a", "output": "b"}]},
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "orca_dpo_pairs": (
        {"system": "s", "question": "a", "chosen": "b", "rejected": "c"},
        "<system>s</s>\n<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "OpenAI, arguments as text": (
        {
            "messages": [
                *chat(("developer", "s"), ("user", "a")),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "sun", "arguments": '{"day":"Monday"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "no"},
                {"role": "assistant", "content": "b", "weight": 0},
            ],
            "tools": [TOOL],
        },
        f"{TOOLS}<system>s</s>\n<user>a</s>\n<assistant>«{CALL}</s>»\n<tool>no</s>\n"
        "<assistant>b</s>\n",
    ),
    "OpenAI, functions": (
        {
            "messages": [
                *chat(("user", "a")),
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "sun", "arguments": '{"day":"Monday"}'},
                },
                {"role": "function", "name": "sun", "content": "no"},
                *chat(("assistant", "b")),
            ],
            "functions": [SUN],
        },
        f"{TOOLS}<user>a</s>\n<assistant>«{CALL}</s>»\n<tool>no</s>\n<assistant>«b</s>»\n",
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}],
                },
            ]
        },
        "<user>a</s>\n<assistant>«bc</s>»\n",
    ),
    "reasoning by another name": (
        {
            "messages": [
                *chat(("user", "a")),
                {"role": "assistant", "thinking": "t", "content": "b"},
            ]
        },
        "<user>a</s>\n<assistant>«<think>t</think>b</s>»\n",
    ),
    "axolotl": (
        {
            "messages": [
                {"role": "user", "content": "a", "training": False},
                {"role": "assistant", "content": "b", "training": False},
                {"role": "user", "content": "c", "training": False},
                {"role": "assistant", "content": "d", "training": True},
            ]
        },
        "<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
    "LLaMA-Factory v1": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "value": "a"}, {"type": "text", "value": "?"}],
                    "loss_weight": 0.0,
                },
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "t"},
                        {
                            "type": "tool_call",
                            "value": CALL_TEXT,
                        },
                    ],
                    "loss_weight": 1.0,
                },
                {"role": "tool", "content": [{"type": "text", "value": "no"}], "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "value": "b"}],
                    "loss_weight": 0.5,
                },
            ],
            "tools": json.dumps([TOOL]),
        },
        f"{TOOLS}<user>a?</s>\n<assistant>«<think>t</think>{CALL}</s>»\n<tool>no</s>\n"
        "<assistant>«b</s>»\n",
    ),
    "Anthropic": (
        {
            "messages": [
                *chat(("user", "a")),
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "see"},
                        {"type": "tool_use", "id": "1", "name": "sun", "input": ARGUMENTS},
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "1", "content": "no"}],
                },
                *chat(("assistant", "b")),
            ]
        },
        f"<user>a</s>\n<assistant>«see{CALL}</s>»\n<tool>no</s>\n<assistant>«b</s>»\n",
    ),
    "TRL, prompt and completion of messages": (
        {
            "prompt": chat(("user", "a"), ("assistant", "b"), ("user", "c")),
            "completion": chat(("assistant", "d")),
        },
        "<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>«d</s>\n»",  # as in training
    ),
    "preference": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "preference without a prompt": (
        {
            "chosen": chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            "rejected": chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "e")),
        },
        "<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
    "UltraFeedback": (
        {
            "prompt": "a",
            "chosen": chat(("user", "a"), ("assistant", "b")),
            "rejected": chat(("user", "a"), ("assistant", "c")),
            "score_chosen": 8.0,
        },
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "LLaMA-Factory, ranking": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
            ],
            "chosen": {"from": "gpt", "value": "d"},
            "rejected": {"from": "gpt", "value": "e"},
        },
        "<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
    "LLaMA-Factory v1, pairs": (
        {
            "chosen_messages": [
                {"role": "user", "content": [{"type": "text", "value": "a"}], "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "value": "b"}],
                    "loss_weight": 1.0,
                },
            ],
            "rejected_messages": [
                {"role": "user", "content": [{"type": "text", "value": "a"}], "loss_weight": 0.0},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "value": "c"}],
                    "loss_weight": 1.0,
                },
            ],
        },
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "ms-swift, rejected": (
        {
            "messages": chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            "rejected_response": "e",
        },
        "<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
    "OpenAI preference": (
        {
            "input": {"messages": chat(("user", "a")), "tools": []},
            "preferred_output": chat(("assistant", "b")),
            "non_preferred_output": chat(("assistant", "c")),
        },
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "KTO": (
        {"prompt": "a", "completion": "b", "label": False},
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "preference as JSON text": (
        {
            "prompt": "a",
            "chosen": json.dumps(chat(("user", "a"), ("assistant", "b"))),
            "rejected": json.dumps(chat(("user", "a"), ("assistant", "c"))),
        },
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "preference without a prompt as Python prints it": (
        {
            "chosen": str(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("bot", "d"))),
            "rejected": str(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("bot", "e"))),
        },
        "<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
    "OpenAI preference as JSON text": (
        {
            "input": json.dumps(chat(("user", "a"), ("assistant", "b"), ("user", "c"))),
            "preferred_output": json.dumps(chat(("assistant", "d"))[0]),
            "non_preferred_output": json.dumps(chat(("assistant", "e"))[0]),
        },
        "<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
    "prompt and completion as JSON text": (
        {
            "prompt": json.dumps(chat(("system", "s"), ("user", "a"))),
            "completion": json.dumps([{"from": "gpt", "value": "b"}]),
        },
        "<system>s</s>\n<user>a</s>\n<assistant>«b</s>\n»",
    ),
    "a completion that is JSON, and no chat": (
        {"prompt": "a", "completion": '[{"role": "chief", "content": "Ada"}]'},
        '<user>a</s>\n<assistant>«[{"role": "chief", "content": "Ada"}]</s>»\n',
    ),
    "a completion that is code, and no chat": (
        {"prompt": '{"role": user}', "completion": '[{"from": x} for x in {"role": y}]'},
        '<user>{"role": user}</s>\n<assistant>«[{"from": x} for x in {"role": y}]</s>»\n',
    ),
    "documents": (
        {
            "messages": chat(("user", "a"), ("assistant", "b")),
            "documents": '[{"title": "t", "text": "x"}]',
            "chat_template_kwargs": {"opening": "!"},
        },
        "<docs>!x</s>\n<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "a content under each of two names, one of them empty": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"role": "bot", "content": "", "text": "b"},
            ]
        },
        "<user>a</s>\n<assistant>«b</s>»\n",
    ),
    "KTO of a chat": (
        {
            "messages": chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            "kto_tag": True,
        },
        "<user>a</s>\n<assistant>b</s>\n<user>c</s>\n<assistant>«d</s>»\n",
    ),
}


@pytest.mark.parametrize("name", ROW_AND_RENDERING)
def test_tokens_targets_and_losses_are_those_of_a_rendering_by_hand(name, tokenizer, model):
    row, rendering = ROW_AND_RENDERING[name]
    check([row], [rendering], tokenizer, model)


@pytest.mark.parametrize(
    ("row", "rendering"),
    [
        ({"instruction": "hi", "input": "you", "output": "yo"}, "hi\nyou«yo</s>»"),
        ({"text": "some text"}, "«some text</s>»"),
        ({"response": "some text"}, "«some text</s>»"),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: I know",
                "rejected": "\n\nHuman: a\n\nAssistant: I don't",
            },
            "\n\nHuman: a\n\nAssistant:« I know</s>»",
        ),
    ],
)
def test_texts_do_without_a_template(row, rendering, tokenizer, model):
    check([row], [rendering], tokenizer, model, template=False)


SHARED = {
    "alpaca_array.json": [
        "<user>Name the longest side of this triangle.\nSides: 3 cm, 4 cm, 5 cm</s>\n"
        "<assistant>«The side of 5 cm is the longest.</s>»\n",
        "<user>Say good morning in Italian.</s>\n<assistant>«Buongiorno!</s>»\n",
        "<user>Which one is bigger?\n7 or 12</s>\n<assistant>«12 is bigger than 7.</s>»\n",
        "<system>You translate greetings.</s>\n<user>Say good morning in German.</s>\n"
        "<assistant>«Guten Morgen!</s>»\n<user>And in French?</s>\n<assistant>«Bonjour !</s>»\n"
        "<user>And in Spanish?</s>\n<assistant>«¡Buenos días!</s>»\n",
    ],
    "chat_parts.jsonl": [
        "<user>Name a red fruit.</s>\n<assistant>«A strawberry.</s>»\n",
        "<user>A number above ten?An odd one.</s>\n<assistant>«Seventeen.</s>»\n",
    ],
    "chat_thinking.jsonl": [
        "<user>Is 91 prime?</s>\n"
        "<assistant>«<think>91 = 7 · 13.</think>No, it is 7 times 13.</s>»\n"
        "<user>And 97?</s>\n<assistant>«<think>Not divisible by 2, 3, 5, 7.</think>Yes.</s>»\n",
    ],
    "chat_tools.jsonl": [
        '<tools>[{"type": "function", "function": {"name": "weather", "description": '
        '"Weather of a city", "parameters": {"type": "object", "properties": {"city": '
        '{"type": "string"}}}}}]</s>\n<system>You are brief.</s>\n<user>Weather in Rome?</s>\n'
        '<assistant>«<call>{"name": "weather", "arguments": {"city": "Rome"}}</call></s>»\n'
        "<tool>sunny, 21</s>\n<assistant>«Sunny, 21 °C.</s>»\n",
        "<user>2 + 2?</s>\n<assistant>Five.</s>\n<user>Are you sure?</s>\n"
        "<assistant>«No: it is four.</s>»\n",
    ],
    "pairs.jsonl.gz": [
        "<user>What do bees make?</s>\n<assistant>«Honey.</s>»\n",
        '<user>Line one\nline two?</s>\n<assistant>«Two lines, "quoted", with a comma.</s>»\n',
    ],
    "preference.jsonl": [
        "<user>Describe rain.</s>\n<assistant>«Water falling from clouds in drops.</s>»\n",
        "<user>A word that rhymes with light?</s>\n<assistant>«Night.</s>\n»",
    ],
    "sharegpt.json": [
        "<user>What is the boiling point of water?</s>\n"
        "<assistant>«At sea level it is 100 °C.</s>»\n"
        "<user>And on a high mountain?</s>\n<assistant>«Lower: about 70 °C at 8,800 metres.</s>»\n",
        '<tools>[{"type": "function", "function": {"name": "temperature", "description": '
        '"Temperature of a city", "parameters": {"type": "object", "properties": {"city": {"type": '
        '"string"}}, "required": ["city"]}}}]</s>\n<system>Answer in one sentence.</s>\n'
        '<user>How warm is it in Oslo?</s>\n<assistant>«<call>{"name": "temperature", "arguments": '
        '{"city": "Oslo"}}</call></s>»\n<tool>{"celsius": 4}</s>\n'
        "<assistant>«It is 4 °C in Oslo.</s>»\n",
    ],
    "plain.txt": [
        "«The river rose in spring.</s>»",
        "«By summer it was low again, and the stones showed.</s>»",
    ],
}
SHARED["pairs_bom_crlf.csv"] = SHARED["pairs.jsonl.gz"]


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the case files are not at {CASES}")
@pytest.mark.parametrize("name", SHARED)
def test_case_files_are_read_as_by_hand(name, tokenizer, model):
    rows = read_rows(str(CASES / name))
    check(rows, SHARED[name], tokenizer, model, template=name != "plain.txt")


def test_a_column_that_first_comes_late_is_read(tokenizer, model):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    renderings = ["<user>a</s>\n<assistant>«b</s>»\n", "<user>c\nd</s>\n<assistant>«e</s>»\n"]
    check(rows, renderings, tokenizer, model)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "context": "c"}, "row 1: column 'context' holds some"),
        ({"prompt": "a", "completion": "b", "functions": [SUN]}, "'functions' holds something"),
        ({"prompt": "a", "completion": "b", "images": ["x.png"]}, "'images' holds something"),
        (
            {"prompt": "a", "completion": "b", "image_path": ["x.png"]},
            "'image_path' holds something",
        ),
        ({"prompt": "a", "completion": "b", "Video_URLs": ["x"]}, "'Video_URLs' holds something"),
        ({"prompt": "a", "completion": "b", "pixel_values": [1.0]}, "'pixel_values' holds some"),
        ({"prompt": "a", "completion": "b", "documents": [{"text": "c"}]}, "leaves out the docum"),
        ({"prompt": "a", "completion": "b", "rejected": "c"}, "'rejected' holds something"),
    ],
)
def test_what_belongs_to_a_text_and_is_not_read_is_refused(row, message, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, row]
    with pytest.raises(ValueError, match=message):
        tokenize_rows(rows, tokenizer, template=True)
    empty = {
        name: value if isinstance(value, str) and name != "context" else None
        for name, value in row.items()
    } | {"rejected": ""}
    assert len(tokenize_rows([rows[0], empty], tokenizer, template=True)) == 2


def test_an_empty_name_reads_no_column(tokenizer):
    row = {"instruction": "a", "input": "x", "output": "b", "context": "y"}
    fields = find_fields(row, Fields(prompt="instruction", completion="output", input=""))
    assert read_conversation(row, fields).plain == ("a", "b")


def messages_row(*messages):
    return {"messages": [{"role": "user", "content": "a"}, *messages]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            messages_row({"role": "narrator", "content": "b"}),
            "role 'narrator' is not known",
        ),
        (
            messages_row({"role": "assistant", "content": 3}),
            "1: the content should be text",
        ),
        (messages_row({"role": "assistant", "content": None}), "message 1: has no content"),
        (
            messages_row({"role": "assistant", "words": "b"}),
            "has no content; there are 'role'",
        ),
        (messages_row({"content": "b"}), "message 1: has no role; there are 'content'"),
        (
            messages_row({"role": "assistant", "content": "b", "weight": -1}),
            "should be a number",
        ),
        (
            messages_row({"role": "user", "content": "b", "weight": 1}),
            "only replies can be",
        ),
        (messages_row({"role": "assistant", "content": "b", "weight": 0}), "so it has no target"),
        (
            messages_row({"role": "assistant", "content": "b", "weight": 1, "train": False}),
            "'weight' and 'train' say different things",
        ),
        (
            messages_row({"role": "assistant", "content": "b", "train_detail": [{"train": True}]}),
            "whole replies are scored alone",
        ),
        (
            messages_row(
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "b", "train": False},
                        {"type": "text", "text": "c", "train": True},
                    ],
                }
            ),
            "its parts have different weights",
        ),
        (messages_row({"role": "assistant", "content": [{"type": "image"}]}), "type 'image' can't"),
        (
            messages_row({"role": "function_call", "value": 0, "content": "sun()"}),
            "should hold JSON",
        ),
        (messages_row({"role": "tool_call", "content": "{}"}), "a tool call has no name"),
        (
            {"prompt": "x", "completion": chat(("user", "a"), ("assistant", "b"))},
            "column 'completion' holds a chat without the text of 'prompt'",
        ),
        ({"messages": 3}, "column 'messages' should hold text"),
        (
            {"prompt": "a", "completion": "b", "system": ["s"]},
            "'system' should hold text",
        ),
        ({"messages": ["a", 4]}, "message 1: should be an object, it is a int"),
        (
            {"system": "s", "messages": chat(("system", "t"), ("user", "a"), ("assistant", "b"))},
            "column 'system' and the chat's own system message differ",
        ),
        (
            {"query": "a", "response": "b", "history": [["c"]]},
            "should hold pairs",
        ),
        (
            {"prompt": "a", "completion": None},
            "'completion' should hold text",
        ),
        ({"prompt": "a", "completion": "b", "context": 3}, "column 'context' should hold text"),
        (
            messages_row({"role": "assistant", "content": "b", "value": "c"}),
            "message 1: 'content' and 'value' say different things",
        ),
        (
            {"conversations": [{"from": "human", "value": "a", "text": "b"}]},
            "'value' and 'text' say different things",
        ),
        ({"prompt": "a", "completion": ["b", "c"]}, "'completion' should hold one text or a list"),
        ({"prompt": ["a"], "completion": "b"}, "column 'prompt' should hold one text or a list"),
        ({**messages_row(), "tools": "use it"}, "column 'tools': should hold JSON, it holds 'use"),
        ({**messages_row(), "history": "a, b"}, "column 'history': should hold JSON"),
        (
            {**messages_row({"role": "assistant", "content": "b"}), "documents": ["a"]},
            "column 'documents': should hold objects",
        ),
        (
            {**messages_row({"role": "assistant", "content": "b"}), "chat_template_kwargs": "[1]"},
            "column 'chat_template_kwargs': should hold an object, it holds a list",
        ),
        (
            messages_row(
                {"role": "assistant", "tool_calls": [{"name": "sun", "arguments": "{Monday"}]}
            ),
            "message 1: arguments of the call of 'sun' should hold JSON",
        ),
    ],
)
def test_rows_that_are_not_right_are_refused_by_name(row, message, tokenizer):
    with pytest.raises(ValueError, match=message) as caught:
        tokenize_rows([row], tokenizer, template=True)
    assert str(caught.value).startswith("row 0: ")


def test_fractional_weights_are_targets_and_said(tokenizer, caplog):
    row = messages_row({"role": "assistant", "content": "b", "loss_weight": 0.25})
    conversation = read_conversation(row, find_fields(row))
    assert conversation.is_target == (False, True)
    assert "loss_weight of 0.25" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "a", "answr": "b"}, "closest: 'promt' to 'prompt', 'answr' to 'answer'"),
        ({"x": "a", "y": "b"}, "closest: a pair, 'x' and 'y'"),
        (
            {"prompt": "a", "completions": ["b"]},
            "closest: a pair, with 'prompt' as its prompt and no 'completion' or 'response' or",
        ),
        ({"input_ids": [1], "labels": [1]}, "its rows are tokens already"),
        (
            {"goal": "a", "sol1": "b", "sol2": "c", "label": 1},
            "a pair, 'goal' and 'sol1' ('sol2', 'label' would not be read; if one of several "
            "answers is right, write it into a column of its own first)",
        ),
        ({"x": "a", "ends": ["b"], "y": "c"}, "a pair, 'x' and 'y' ('ends' would not be read"),
        ({"turnlist": [{"role": "user"}]}, "closest: a chat in 'turnlist'"),
    ],
)
def test_an_unknown_shape_gets_its_columns_the_flags_and_the_closest_format(row, message):
    with pytest.raises(ValueError, match="no known text columns among") as caught:
        find_fields(row)
    assert message in str(caught.value)
    assert len(row) > 2 or "would not be read" not in str(caught.value)
    for part in (*map(repr, row), "--prompt-column", "--completion-column", "--messages-column"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "row", [{"role": "user", "content": "a"}, {"Role": "prompter", "text": "a"}]
)
def test_rows_that_are_messages_are_not_taken_for_texts(row):
    with pytest.raises(ValueError, match=r"the rows are messages, .* should be a whole chat"):
        find_fields(row)
    text = list(row)[1]
    assert find_fields(row, Fields(completion=text)).completion == text
    assert find_fields({**row, "prompt": "b", "completion": "c"}).prompt == "prompt"


def test_the_columns_of_a_wide_row_are_not_all_told():
    with pytest.raises(ValueError, match=r"'c0', 'c1', .* and 976 more; name them") as caught:
        find_fields({f"c{number}": 1 for number in range(1000)})
    assert len(str(caught.value)) < 500


def test_a_chat_reads_no_input():
    fields = find_fields({"messages": chat(("user", "a"), ("assistant", "b")), "input": "x"})
    assert fields.columns() == ["messages", "system", "history", "tools", "documents"]
    assert "documents" not in find_fields({"text": "a", "documents": ["b"]}).columns()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (Fields(messages="messages", prompt="a", completion="b"), "messages='messages' and prompt"),
        (Fields(messages="messages", input="a"), "input='a' goes with a prompt, and the rows have"),
        (Fields(completion="a", input="b"), "input='b' goes with a prompt"),
        (Fields(completion="a", documents="b"), "documents='b' goes with a prompt or a chat"),
    ],
)
def test_columns_that_would_not_be_read_are_refused(fields, message):
    row = {"messages": chat(("user", "a"), ("assistant", "b")), "a": "a", "b": "b"}
    with pytest.raises(ValueError, match=message):
        find_fields(row, fields)


def test_formats_have_names_and_say_what_is_scored():
    names = {
        "Alpaca": ROW_AND_RENDERING["Alpaca"][0],
        "Dolly": ROW_AND_RENDERING["Dolly"][0],
        "ShareGPT": ROW_AND_RENDERING["ShareGPT"][0],
        "OpenAI or TRL chat": ROW_AND_RENDERING["OpenAI, functions"][0],
        "LLaMA-Factory v1": ROW_AND_RENDERING["LLaMA-Factory v1"][0],
        "OpenAI preference": ROW_AND_RENDERING["OpenAI preference"][0],
        "preference (OpenAI or TRL chat)": ROW_AND_RENDERING["ms-swift, rejected"][0],
        "KTO (prompt and completion)": ROW_AND_RENDERING["KTO"][0],
        "plain text": {"text": "a"},
    }
    assert {name: find_fields(row).name for name, row in names.items()} == {n: n for n in names}
    as_csv = {"prompt": "a", "completion": "b", "label": "False"}
    assert find_fields(as_csv).name == "KTO (prompt and completion)"
    row = ROW_AND_RENDERING["UltraFeedback"][0]
    fields = find_fields(row)
    assert (
        scored_part(row, fields) == "the preferred reply ('chosen'), and not the one in 'rejected'"
    )
    assert unread_columns(row, fields) == ["score_chosen"]
    row = ROW_AND_RENDERING["KTO"][0]
    assert scored_part(row, find_fields(row)) == "the reply in 'completion', whatever 'label' says"
