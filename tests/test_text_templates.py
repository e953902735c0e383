"""Chat templates of many families: each chat has the right targets, or is refused by name."""

import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flowdata.text import find_fields, tokenize_rows
from tests.chat_templates import (
    MULTI,
    ROWS,
    SINGLE,
    THOUGHTFUL,
    WEATHER,
    call,
    says,
    tokenizer_with,
    unigram_tokenizer,
)

trl = pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on needs Python 3.11")

FOLDER = Path(trl.__file__).parent / "chat_templates"

# What becomes of the chats of `ROWS` (one turn, several, a system message, tools, reasoning): 1 is
# a sample of the whole chat, 2 is one for each of its two replies, - is a refusal. A training form
# does the same as the template that it is the form of.
TABLE = {
    "cohere": ("training", "111--"),
    "cohere2": ("training", "111--"),
    "deepseek_r1_distill": ("training", "111--"),
    "deepseekv3": ("training", "111--"),
    "diffusion_gemma": ("training", "11112"),
    "gemma": ("training", "11---"),
    "gemma3": ("training", "111--"),
    "gemma4": ("own", "1111-"),
    "gemma4_v2": ("own", "1111-"),
    "gemma4_v3": ("own", "1111-"),
    "gemma4_v4": ("own", "1111-"),
    "gemma4_v5": ("own", "11112"),
    "glm4moe": ("training", "11112"),
    "gptoss": ("training", "11112"),
    "idefics3": ("training", "111--"),
    "lfm2": ("training", "111--"),
    "lfm2_2_5": ("marked", "11112"),
    "lfm2_2_5_v2": ("marked", "11112"),
    "lfm2_2_5_vl": ("marked", "11112"),
    "lfm2_v2": ("training", "1111-"),
    "llama3": ("training", "111--"),
    "llama3_1": ("own", "1111-"),
    "llama3_2": ("own", "1111-"),
    "llava_next": ("training", "111--"),
    "muse_glimmer": ("training", "11111"),
    "nemotron_3_5_lightning": ("training", "11112"),
    "nemotron_3_nano": ("training", "11112"),
    "nemotron_3_super": ("training", "11112"),
    "nemotron_3_ultra": ("training", "11112"),
    "phi3": ("training", "111--"),
    "phi3_5": ("training", "111--"),
    "qwen2_5": ("training", "1111-"),
    "qwen2_5_vl": ("training", "111--"),
    "qwen3": ("training", "11111"),
    "qwen3_5_nothink": ("training", "11111"),
    "qwen3_5_think": ("training", "11111"),
    "qwen3_6": ("training", "11111"),
    "qwen3_8": ("training", "11111"),
    "qwen3_instruct_2507": ("training", "1111-"),
    "qwen3_vl": ("training", "1111-"),
    "smolvlm": ("training", "111--"),
}
REASONS = {  # of a refusal, by the chat that is refused
    "system": "System role not supported",
    "tools": "leaves out the tools|leaves a tool call|roles must alternate|Only user and assistant",
    "reasoning": "leaves reasoning of a message of role 'assistant' out of the targets",
}
SAID = {  # the texts of a chat's replies, and those that are nobody's reply
    "single": (["Reply one."], ["Ask one?"]),
    "multi": (["Reply one.", "Reply two."], ["Ask one?", "Ask two?"]),
    "system": (["Reply one.", "Reply two."], ["Be brief.", "Ask one?", "Ask two?"]),
    "tools": (
        ["weather", "Rome", "It shines."],
        ["How is Rome?", "sunny and warm", "Weather of a city"],
    ),
    "reasoning": (
        ["Thought one.", "Reply one.", "Thought two.", "Reply two."],
        ["Ask one?", "Ask two?"],
    ),
}


def source_of(name):
    return (FOLDER / f"{name}.jinja").read_text()


def tokenize(tokenizer, row, **options):
    return tokenize_rows([row], tokenizer, find_fields(row), template=False, **options)


def texts_of(samples, tokenizer):
    """The whole text and the targets' text of each sample."""
    return [
        (
            tokenizer.decode(sample["input_ids"]),
            tokenizer.decode(sample["input_ids"][sample["labels"] != -100]),
        )
        for sample in samples
    ]


def assert_right(samples, tokenizer, chat):
    """Every reply is a target once, and nothing else that was said is."""
    replies, others = SAID[chat]
    targets = "".join(target for _, target in texts_of(samples, tokenizer))
    positions = [targets.index(reply) for reply in replies]
    assert positions == sorted(positions)
    assert chat == "tools" or all(targets.count(reply) == 1 for reply in replies)
    assert not any(other in targets for other in others)
    last_text = texts_of(samples, tokenizer)[-1][0]
    assert all(other in last_text for other in others)


def files():
    return sorted(file.stem for file in FOLDER.glob("*.jinja"))


def test_the_table_has_every_template():
    assert {name.removesuffix("_training") for name in files()} == set(TABLE)


@pytest.mark.parametrize("name", files())
def test_templates_give_the_right_targets_or_refuse(name):
    form, outcomes = TABLE[name.removesuffix("_training")]
    form = "marked" if name.endswith("_training") else form
    tokenizer = tokenizer_with(source_of(name))
    for (chat, row), outcome in zip(ROWS.items(), outcomes, strict=True):
        if outcome == "-":
            with pytest.raises(ValueError, match=REASONS[chat]):
                tokenize(tokenizer, row)
            continue
        samples = tokenize(tokenizer, row)
        assert (samples.replies, len(samples)) == (form, int(outcome)), chat
        assert samples.rows.tolist() == [0] * int(outcome)
        assert_right(samples, tokenizer, chat)


# --- templates that TRL does not know -------------------------------------------------------------

CUT = {  # rewritten once later turns follow
    "qwen3": "12222",
    "qwen3_6": "12212",
    "gptoss": "12212",
    "deepseekv3": "111--",
    "nemotron_3_nano": "11112",
    "glm4moe": "11112",
    "gemma3": "111--",
    "phi3": "111--",
    "smolvlm": "111--",
    "cohere": "111--",
    "qwen3_8": "11111",
}


@pytest.mark.parametrize("name", CUT)
def test_an_edited_template_is_cut_by_what_each_reply_adds(name):
    tokenizer = tokenizer_with(source_of(name) + "{# edited #}")
    for (chat, row), outcome in zip(ROWS.items(), CUT[name], strict=True):
        if outcome == "-":
            with pytest.raises(ValueError, match=REASONS[chat]):
                tokenize(tokenizer, row)
            continue
        samples = tokenize(tokenizer, row)
        assert (samples.replies, len(samples)) == ("own", int(outcome)), chat
        assert_right(samples, tokenizer, chat)
        messages = row["messages"]
        replies = [n for n, message in enumerate(messages, 1) if message["role"] == "assistant"]
        ends = replies if samples.is_split else [len(messages)]
        for (text, target), end in zip(texts_of(samples, tokenizer), ends, strict=True):
            written = [says(m["role"], [{"type": "text", "text": m["content"]}]) for m in messages]
            given = written if name == "smolvlm" else messages
            assert text == tokenizer.apply_chat_template(
                given[:end], tokenize=False, tools=row.get("tools")
            )
            assert text.rstrip().endswith(target) or not samples.is_split


INSTRUCT = (  # Llama 2: a space inside the brackets, the system message in the first question
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content']"
    " + '\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "(system if loop.index0 == 0 else '') + m['content'] | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LAST_QUESTION = (  # Mistral v0.3: the system message goes with the last question
    "{% set ns = namespace(system='') %}{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\\n\\n' %}"
    "{% elif m['role'] == 'user' %}{% set last = messages[loop.index0:] | selectattr('role', "
    "'equalto', 'user') | list | length == 1 %}{{ '[INST]' + (ns.system if last else '') + "
    "m['content'] + '[/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
END_AT_LAST = (  # Phi-4-mini: the end of the text stands where no reply is to follow
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
SEPARATED = (  # Phi-4
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + "
    "'<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
WORDS = (  # Vicuna: no special token but the end
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}{% else %}"
    "{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
FORGETFUL = (  # QwQ and R1: earlier thoughts are taken out of the content; a thought is begun
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and not "
    "loop.last %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + c + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PARTS = (  # a vision model's: content in parts alone
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{% if p['type'] == 'text' "
    "%}{{ p['text'] }}{% elif p['type'] == 'image' %}<image>{% endif %}{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_END = "{% for m in messages %}\n{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
STRANGERS = {
    "Llama 2": (INSTRUCT, ["Reply one. <eos>", "Reply two. <eos>"], 1),
    "Mistral": (LAST_QUESTION, ["Reply one.<eos>", "Reply two.<eos>"], 2),
    "Phi-4-mini": (END_AT_LAST, ["Reply one.<|end|>", "Reply two.<|end|><eos>"], 1),
    "Phi-4": (SEPARATED, ["Reply one.<|im_end|>", "Reply two.<|im_end|>"], 1),
    "Vicuna": (WORDS, [" Reply one.<eos>", " Reply two.<eos>"], 1),
    "forgetful": (FORGETFUL, ["Reply one.<|im_end|>", "Reply two.<|im_end|>"], 1),
    "parts": (PARTS, ["Reply one.<eos>", "Reply two.<eos>"], 1),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_further_templates(name):
    template, replies, number = STRANGERS[name]
    tokenizer = tokenizer_with(template)
    row = ROWS["system"]
    samples = tokenize(tokenizer, row)
    assert len(samples) == number
    assert_right(samples, tokenizer, "system")
    targets = "".join(target for _, target in texts_of(samples, tokenizer))
    assert targets.replace(" ", "") == "".join(replies).replace(" ", "")


@pytest.mark.parametrize("thought", ["<think>\nDeep.\n</think>\n\n", "<think>Deep.</think>"])
def test_thoughts_within_the_content_are_targets_in_every_turn(thought):
    tokenizer = tokenizer_with(FORGETFUL)
    chat = [*SINGLE[:1], says("assistant", f"{thought}Reply one."), *MULTI[2:]]
    samples = tokenize(tokenizer, {"messages": chat})
    assert len(samples) == 2
    (_, first), (text, second) = texts_of(samples, tokenizer)
    assert "Deep." in first
    assert first.endswith("Reply one.<|im_end|>")
    assert "Deep." not in text
    assert second == "Reply two.<|im_end|>"


def test_a_template_that_swallows_replies_is_noticed():
    swallowing = NO_END.replace("{{ m['content'] }}", "{{ m['content'][0]['text'] }}<eos>")
    row = {
        "messages": [says("user", "Hi"), says("assistant", [{"type": "text", "text": "Yo"}] * 2)]
    }
    tokenizer = tokenizer_with(swallowing)
    [(_, target)] = texts_of(tokenize(tokenizer, row), tokenizer)
    assert target == "assistant: YoYo<eos>"  # in one part: the template reads the first alone
    tokenizer.chat_template = NO_END.replace("{{ m['content'] }}", "<eos>")
    with pytest.raises(ValueError, match="row 0: the chat template leaves content of a message"):
        tokenize(tokenizer, row)


def test_a_template_that_asks_for_a_system_message_is_given_strings_all_the_same():
    asking = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('Say who') }}{% endif %}"
    tokenizer = tokenizer_with(asking + SEPARATED)
    assert_right(tokenize(tokenizer, ROWS["system"]), tokenizer, "system")
    with pytest.raises(ValueError, match="refuses the chat: Say who"):
        tokenize(tokenizer, ROWS["multi"])


def test_content_in_parts_is_text_to_a_template_that_prints_it():
    row = {"messages": [says("user", [{"type": "text", "text": "Hi"}]), says("assistant", "Yo")]}
    tokenizer = tokenizer_with(END_AT_LAST.replace("m['content'] +", "m['content'] | string +"))
    [(text, target)] = texts_of(tokenize(tokenizer, row), tokenizer)
    assert text == "<|user|>Hi<|end|><|assistant|>Yo<|end|><eos>"
    assert target == "Yo<|end|><eos>"


def test_replies_that_are_no_targets_are_left_out_of_marks():
    for name in ("qwen3", "gptoss", "lfm2_2_5", "diffusion_gemma", "llama3_1"):
        tokenizer = tokenizer_with(source_of(name))
        for off in (0, 1):
            chat = [dict(message) for message in MULTI]
            chat[1 + 2 * off]["weight"] = 0
            samples = tokenize(tokenizer, {"messages": chat})
            targets = "".join(target for _, target in texts_of(samples, tokenizer))
            assert ("Reply one." in targets, "Reply two." in targets) == (off == 1, off == 0)


def test_a_chat_may_begin_with_a_reply_or_end_with_a_question():
    chat = [says("assistant", "Welcome."), *MULTI, says("user", "Ask three?")]
    for template in (SEPARATED, source_of("qwen3"), source_of("llama3_1"), NO_END):
        tokenizer = tokenizer_with(template)
        samples = tokenize(tokenizer, {"messages": chat})
        targets = "".join(target for _, target in texts_of(samples, tokenizer))
        for reply in ("Welcome.", "Reply one.", "Reply two."):
            assert targets.count(reply) == 1
        assert "Ask" not in targets
        assert "system" not in targets


def test_the_choice_is_said(caplog):
    caplog.set_level("INFO", logger="flowdata")

    def said(template, row=ROWS["multi"]):
        caplog.clear()
        tokenize(tokenizer_with(template), row)
        return caplog.text

    assert "marks as generated" in said(source_of("lfm2_2_5"))
    assert "TRL's training form" in said(source_of("qwen3"))
    assert said(SEPARATED) == ""  # each reply is what the template adds to the chat, as usual
    assert "1 of 1 rows are scored reply by reply" in said(LAST_QUESTION, ROWS["system"])
    assert "no token that ends a reply" in said(NO_END)
    assert "no token that ends a reply" not in said(INSTRUCT)
    assert "--chat-template FILE holds it" in said(source_of("gptoss"))
    assert "--template-option date_string=… holds it" in said(source_of("llama3_2"))
    begun = FORGETFUL.replace("<think>\n", "<muse>\n")
    assert "writes '<muse>\\n' before a reply that is generated" in said(begun)


def test_the_variables_of_a_template_can_be_set():
    tokenizer = tokenizer_with(source_of("llama3_2"))
    samples = tokenize(tokenizer, ROWS["single"], template_options={"date_string": "1 May 2024"})
    assert "Today Date: 1 May 2024" in tokenizer.decode(samples[0]["input_ids"])
    with pytest.raises(ValueError, match="has no variable 'enable_thinking'"):
        tokenize(tokenizer, ROWS["single"], template_options={"enable_thinking": False})
    row = {"prompt": "a", "completion": "b"}
    with pytest.raises(ValueError, match="template_options has no effect"):
        tokenize(tokenizer, row, template_options={"date_string": ""})


def test_a_slow_tokenizer_gives_the_same_targets():
    fast = tokenizer_with(SEPARATED)

    class Slow:  # what encoding uses of a tokenizer that does not say where its tokens lie
        is_fast = False

        def __getattr__(self, name):
            return getattr(fast, name)

        def __call__(self, text, **options):
            return {"input_ids": fast(text, **options)["input_ids"]}

    for row in (ROWS["multi"], ROWS["system"]):
        expected, samples = tokenize(fast, row), tokenize(Slow(), row)
        assert samples.digest() == expected.digest()


def test_tool_calls_are_written_as_the_template_reads_them():
    text_alone = (
        "{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + c['function']['arguments'] "
        "}}{% endfor %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = tokenizer_with(text_alone)
    [(_, target)] = texts_of(tokenize(tokenizer, ROWS["tools"]), tokenizer)
    assert 'weather{"city": "Rome"}' in target
    chat = [says("user", "x"), says("assistant", "", tool_calls=[call("weather", city="Rome")])]
    tokenizer.chat_template = SEPARATED
    with pytest.raises(ValueError, match=r"leaves a tool call of .*; name a template that writes"):
        tokenize(tokenizer, {"messages": chat})


def test_reasoning_that_a_template_never_writes_is_refused_in_the_last_turn_too():
    tokenizer = tokenizer_with(SEPARATED)
    with pytest.raises(ValueError, match=r"leaves reasoning .*\('Thought one.'\); name a template"):
        tokenize(tokenizer, {"messages": THOUGHTFUL[:2]})


def test_the_template_of_the_guide_on_files_writes_reasoning():
    guide = (Path(__file__).parents[1] / "examples" / "guides" / "files.md").read_text("utf-8")
    template = guide.partition("```jinja\n")[2].partition("```")[0]
    tokenizer = tokenizer_with(template)
    (sample,) = tokenize(tokenizer, {"messages": THOUGHTFUL[:2]})
    targets = tokenizer.decode(sample["labels"][sample["labels"] != -100])
    assert targets.startswith("<think>Thought one.</think>")
    assert "Ask" not in targets


@pytest.mark.parametrize("name", ["llama3_1", "gemma3", "qwen2_5", "idefics3", "deepseekv3"])
def test_reasoning_in_the_words_of_the_question_is_missed_all_the_same(name):
    reply = says("assistant", "Reply one.") | {"reasoning_content": "What is it?"}
    chat = [says("user", "Ask. What is it?"), reply]
    with pytest.raises(ValueError, match=r"leaves reasoning .*\('What is it\?'\); name a template"):
        tokenize(tokenizer_with(source_of(name)), {"messages": chat})


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "lfm2_2_5", "llama3_1", "phi3"])
def test_white_space_that_is_in_no_token_does_not_widen_the_targets(name):
    # Marks that end in a line break, which this tokenizer drops: transformers' own mask of the
    # assistant's tokens goes on to the end of the chat then.
    tokenizer = unigram_tokenizer(source_of(name))
    samples = tokenize(tokenizer, ROWS["multi"])
    [(_, target)] = texts_of(samples, tokenizer)
    target = target.replace(" ", "").replace("▁", "")
    assert "Ask" not in target
    assert target.count("Reply") == 2
    assert target.endswith(">")


@pytest.mark.parametrize("last", ["é", "。", "😀"])
@pytest.mark.parametrize("form", ["own", "marked"])
def test_all_bytes_of_the_last_character_are_targets(last, form):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base)
    marks = ("{% generation %}", "{% endgeneration %}") if form == "marked" else ("", "")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A: "
        + "{{ m.content }}".join(marks)
        + "\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    chat = [says("user", "é"), says("assistant", f"好 {last}")] * 2
    [sample] = tokenize(tokenizer, {"messages": chat})
    targets = sample["input_ids"][sample["labels"] != -100]
    assert targets.tolist() == 2 * tokenizer(f"好 {last}")["input_ids"]


def test_a_tokenizer_may_have_another_template_for_chats_with_tools():
    plain, with_tools = SEPARATED, "{{ tools | tojson }}" + source_of("qwen2_5")
    marked = source_of("lfm2_2_5")
    for templates, form in (
        ({"default": plain, "tool_use": with_tools}, "own"),
        ({"default": marked, "tool_use": with_tools}, "own"),
        ({"default": marked, "tool_use": marked + "{# tools #}"}, "marked"),
    ):
        tokenizer = tokenizer_with(templates["default"] + templates["tool_use"])
        tokenizer.chat_template = templates
        for chat in ("multi", "tools"):
            samples = tokenize(tokenizer, ROWS[chat])
            assert samples.replies == form
            assert_right(samples, tokenizer, chat)


@pytest.mark.parametrize("city", ["L'Aquila", 'The "Eternal" City', "Zürich\nHB", "a\\b", "上海"])
def test_quoted_arguments_are_not_taken_for_missing_ones(city):
    chat = [
        says("user", "How is it there?"),
        says("assistant", "", tool_calls=[call("weather", city=city, days=3, parts=["am", "pm"])]),
        says("tool", f'{{"of": "{city}"}}', name="weather"),
        says("assistant", "It shines."),
    ]
    row = {"messages": chat, "tools": [WEATHER]}
    for name in ("qwen3", "qwen3_6", "lfm2_2_5", "llama3_1", "gptoss", "glm4moe", "gemma4"):
        tokenizer = tokenizer_with(source_of(name))
        targets = "".join(target for _, target in texts_of(tokenize(tokenizer, row), tokenizer))
        assert "weather" in targets
        assert targets.count("It shines.") == 1


FURTHER = {
    "Granite": (
        "{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}"
        "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant"
        "<|end_of_role|>{% endif %}"
    ),
    "OLMo": (
        "{{ eos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ eos_token }}{% else %}\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "Zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>{% endif %}{% endfor %}"
    ),
    "DeepSeek V3.1": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
        "{% elif m['role'] == 'assistant' %}<｜Assistant｜></think>{{ m['content'].split("
        "'</think>')[-1] }}<｜end▁of▁sentence｜>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}"
        "{% endif %}"
    ),
    "Kimi": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_system|>system"
        "<|im_middle|>You are helpful<|im_end|>{% endif %}<|im_{{ m['role'] }}|>{{ m['role'] }}"
        "<|im_middle|>{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}"
        "<|im_assistant|>assistant<|im_middle|>{% endif %}"
    ),
    "Mistral Small": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}[SYSTEM_PROMPT]"
        "{{ m['content'] }}[/SYSTEM_PROMPT]{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}"
        "[/INST]{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.parametrize("chat", ["single", "multi", "system"])
def test_six_more_families(name, chat):
    tokenizer = tokenizer_with(FURTHER[name])
    samples = tokenize(tokenizer, ROWS[chat])
    assert_right(samples, tokenizer, chat)
    for _, target in texts_of(samples, tokenizer):
        assert target.startswith(("Reply", "\nReply"))
        assert target.endswith(">")
    assert samples.is_split == (name == "OLMo" and chat != "single")
    with pytest.raises(ValueError, match="leaves reasoning"):
        tokenize(tokenizer, ROWS["reasoning"])
    with pytest.raises(ValueError, match="leaves out the tools"):
        tokenize(tokenizer, ROWS["tools"])


@pytest.mark.parametrize(
    ("name", "number"),
    [("qwen3", 1), ("glm4moe", 2), ("gptoss", 2), ("lfm2_2_5", 2), ("gemma4_v5", 2)],
)
def test_a_thought_that_two_replies_share_is_a_target_twice(name, number):
    chat = [message | {} for message in THOUGHTFUL]
    for reply in (chat[1], chat[3]):
        reply["reasoning_content"] = "I answer the question."
    tokenizer = tokenizer_with(source_of(name))
    samples = tokenize(tokenizer, {"messages": chat})
    assert len(samples) == number
    targets = "".join(target for _, target in texts_of(samples, tokenizer))
    assert targets.count("I answer the question.") == 2


def test_marks_may_leave_reasoning_out_of_the_targets():
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "<think>{{ m['reasoning_content'] }}</think>{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    tokenizer = tokenizer_with(template)
    [(text, target)] = texts_of(tokenize(tokenizer, ROWS["reasoning"]), tokenizer)
    assert target == "Reply one.<|im_end|>Reply two.<|im_end|>"
    assert "<think>Thought one.</think>Reply one." in text


def test_without_trl_the_tokenizers_own_template_is_cut(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)  # as if not installed
    tokenizer = tokenizer_with(source_of("qwen3"))
    samples = tokenize(tokenizer, ROWS["multi"])
    assert (samples.replies, len(samples)) == ("own", 2)
    assert_right(samples, tokenizer, "multi")
