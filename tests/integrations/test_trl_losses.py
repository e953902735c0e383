"""FlowSFTTrainer's gradients against loops written by hand, beside the main path."""

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on needs Python 3.11")

from transformers import MixtralConfig, MixtralForCausalLM
from trl import SFTConfig, SFTTrainer

from flowdata.integrations.trl import FlowSFTTrainer
from flowdata.losses import causal_lm_loss
from tests.integrations import tiny, train_worker

N = 8
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(7))


def chats():
    """Two turns each; the second reply is long in some."""
    rows = [
        [
            {"role": "user", "content": f"w{3 + i} w{4 + i}"},
            {"role": "assistant", "content": f"w{9 + i}"},
            {"role": "user", "content": "w5"},
            {"role": "assistant", "content": " ".join([f"w{11 + i}"] * (1 + 2 * i % 5))},
        ]
        for i in range(N)
    ]
    return Dataset.from_dict({"messages": rows})


def prompts():
    return Dataset.from_dict(
        {
            "prompt": [f"w{1 + i} w2 w3" for i in range(N)],
            "completion": [" ".join([f"w{9 + i}"] * (1 + i % 4)) for i in range(N)],
        }
    )


def texts():
    words = [[f"w{1 + (7 * i + 5 * j * j) % 36}" for j in range(2 + i % 5)] for i in range(N)]
    return Dataset.from_dict({"text": [" ".join(row) for row in words]})


def tokenizer():
    """Marks what the assistant says, as assistant_only_loss asks."""
    made = tiny.make_tokenizer()
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'w2 ' }}{% generation %}"
        "{{ m['content'] }}{{ ' <end> ' }}{% endgeneration %}{% else %}{{ 'w1 ' }}"
        "{{ m['content'] }}{{ ' <end> ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
    )
    return made


def trainer_of(folder, data, settings=(), model=None, gradients=None, **options):
    arguments = train_worker.hf_arguments(
        SFTConfig, **({"batch_size": N, "steps": 1} | dict(settings)), bf16=False
    )
    if gradients is not None:
        options["callbacks"] = [train_worker.record_gradients(gradients)]
    options = {"processing_class": tokenizer()} | options
    return FlowSFTTrainer(
        tiny.make_model() if model is None else model, arguments, train_dataset=data, **options
    )


def rows_of(data, settings=(), **options):
    """What plain SFTTrainer makes of a data set that has no packing: one row for each sample."""
    arguments = train_worker.hf_arguments(
        SFTConfig, **({"batch_size": N, "steps": 1} | dict(settings)), bf16=False
    )
    options = {"processing_class": tokenizer()} | options
    return SFTTrainer(tiny.make_model(), arguments, train_dataset=data, **options).train_dataset


def gradient_by_hand(rows, weights, model=None):
    """One sample at a time: Σ weight · Σ loss over the number of targets."""
    model = tiny.make_model() if model is None else model
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    for row, weight in zip(rows, weights, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :]
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        (weight * losses / count).backward()
    return tiny.flat_gradient(model)


CASES = {
    "assistant only": (chats, {"assistant_only_loss": True}),
    "assistant only, cut": (chats, {"assistant_only_loss": True, "max_length": 12}),
    "whole chats": (chats, {}),
    "completion only": (prompts, {"completion_only_loss": True}),
    "prompts too": (prompts, {"completion_only_loss": False}),
    "texts": (texts, {}),
    "cut at the start": (texts, {"max_length": 4}),
    "multiple of 8": (texts, {"pad_to_multiple_of": 8}),
    "accumulated": (chats, {"batch_size": 2, "steps": 4}),
    "checkpointed": (texts, {"gradient_checkpointing": True}),
    "plain loss": (texts, {"loss_type": "nll"}),
}
LAYOUTS = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 64, "batch_size": 8, "steps": 1},
    "wrapped": {
        "packing": True,
        "max_length": 512,
        "batch_size": 8,
        "steps": 1,
        "packing_strategy": "wrapped",
    },
}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("layout", ["padded", "padding-free", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_sample_at_a_time(tmp_path, case, layout):
    make, settings = CASES[case]
    settings = settings | LAYOUTS[layout]
    if "max_length" in CASES[case][1] and layout != "padded":
        pytest.skip("this case cuts rows, and TRL cuts joined ones elsewhere")
    plain = {k: v for k, v in settings.items() if k not in ("packing", "padding_free")}
    rows, gradients = rows_of(make(), plain | {"batch_size": N, "steps": 1}), []
    assert len(rows) == N
    trainer_of(tmp_path, make(), settings, gradients=gradients, scores=WEIGHTS).train()
    tiny.assert_same_gradient(gradients[0], gradient_by_hand(rows, WEIGHTS))


def test_a_formatting_function_sees_the_sample_that_was_weighed(tmp_path):
    gradients, options = [], {"formatting_func": lambda row: f"w7 {row['question']} w8"}
    data = texts().rename_column("text", "question")
    rows = rows_of(data, **options)
    trainer_of(tmp_path, data, gradients=gradients, scores=WEIGHTS, **options).train()
    tiny.assert_same_gradient(gradients[0], gradient_by_hand(rows, WEIGHTS))


@pytest.mark.parametrize("settings", [{}, LAYOUTS["padding-free"]], ids=["padded", "padding-free"])
def test_a_prepared_data_set_is_weighted_as_it_is(tmp_path, settings):
    rows, gradients = rows_of(texts()), []
    settings = settings | {"dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer_of(tmp_path, rows, settings, gradients=gradients, scores=WEIGHTS).train()
    tiny.assert_same_gradient(gradients[0], gradient_by_hand(rows, WEIGHTS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stream_brings_its_weights_along(tmp_path, layout):
    rows, gradients = rows_of(texts()), []
    stream = texts().add_column("weight", WEIGHTS.tolist()).to_iterable_dataset()
    trainer_of(tmp_path, stream, LAYOUTS[layout], gradients=gradients).train()
    if layout == "wrapped":  # documents see each other
        assert len(gradients) == 1
        return
    tiny.assert_same_gradient(gradients[0], gradient_by_hand(rows, WEIGHTS))


def test_rows_packed_by_the_user_have_a_weight_each(tmp_path):
    """Such a row is one sample to flowdata: all of its tokens have its weight."""
    packs = rows_of(texts(), LAYOUTS["packed"] | {"max_length": 12})
    assert "seq_lengths" in packs.column_names
    weights = WEIGHTS[: len(packs)]
    settings = LAYOUTS["packed"] | {
        "max_length": 12,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    gradients = []
    trainer_of(tmp_path, packs, settings, gradients=gradients, scores=weights).train()
    documents, repeated = [], []
    for row, weight in zip(packs, weights, strict=True):
        start = 0
        for length in row["seq_lengths"]:
            end = start + length
            documents.append({k: row[k][start:end] for k in ("input_ids", "labels")})
            repeated.append(weight)
            start = end
    tiny.assert_same_gradient(gradients[0], gradient_by_hand(documents, repeated))


@pytest.mark.parametrize("kind", ["prompt tuning", "prefix tuning", "lora"])
def test_adapters_are_trained_by_the_weights(tmp_path, kind):
    peft = pytest.importorskip("peft")
    configs = {
        "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    }

    def model():
        torch.manual_seed(3)
        return peft.get_peft_model(tiny.make_model(), configs[kind])

    gradients = []
    settings = {"gradient_checkpointing": False}
    rows = rows_of(texts())
    trainer_of(
        tmp_path, texts(), settings, gradients=gradients, scores=WEIGHTS, model=model()
    ).train()
    tiny.assert_same_gradient(gradients[0], gradient_by_hand(rows, WEIGHTS, model()))


def test_a_mixture_of_experts_keeps_its_balancing_loss(tmp_path):
    def model():
        torch.manual_seed(4)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=tiny.VOCABULARY,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=3,
                num_experts_per_tok=2,
                pad_token_id=0,
                output_router_logits=True,
                router_aux_loss_coef=0.3,
            )
        )

    rows, gradients = rows_of(texts()), []
    trainer_of(tmp_path, texts(), gradients=gradients, scores=WEIGHTS, model=model()).train()
    by_hand = model()
    samples = [{k: torch.tensor(row[k]) for k in ("input_ids", "labels")} for row in rows]
    batch = tiny.collate(samples)
    out = by_hand(batch["input_ids"], batch["attention_mask"])
    loss = causal_lm_loss(out.logits, batch["labels"], WEIGHTS) + 0.3 * out.aux_loss
    loss.backward()
    tiny.assert_same_gradient(gradients[0], tiny.flat_gradient(by_hand))


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "dft"}, "use loss_type='nll' with token_rule='dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor computes a loss of its own"),
    ],
)
def test_losses_that_weights_can_not_reach_are_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, texts(), settings, scores=WEIGHTS)


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"loss_type": "chunked_nll"}],
    ids=["dft", "smoothed", "chunked"],
)
def test_resampling_leaves_every_loss_alone(tmp_path, settings):
    gradients = []
    drawn = torch.eye(N)[5]
    settings = settings | {"batch_size": 2}
    trainer_of(
        tmp_path, texts(), settings, gradients=gradients, scores=drawn, resample=True
    ).train()
    arguments = train_worker.hf_arguments(SFTConfig, **{"steps": 1} | settings, bf16=False)
    expected = []
    SFTTrainer(
        tiny.make_model(),
        arguments,
        train_dataset=texts().select([5, 5]),
        processing_class=tokenizer(),
        callbacks=[train_worker.record_gradients(expected)],
    ).train()
    tiny.assert_same_gradient(gradients[0], expected[0])


def test_chunked_nll_is_nll(tmp_path):
    rows, gradients = rows_of(texts()), []
    with pytest.warns(FutureWarning, match="chunked_nll"):
        trainer = trainer_of(
            tmp_path, texts(), {"loss_type": "chunked_nll"}, gradients=gradients, scores=WEIGHTS
        )
    trainer.train()
    tiny.assert_same_gradient(gradients[0], gradient_by_hand(rows, WEIGHTS))


def test_ligers_fused_loss_is_refused_by_name(tmp_path):
    """It takes the place of the forward that the weights go through; Liger need not be there."""
    config = {"fused_linear_cross_entropy": True}
    settings = {"use_liger_kernel": True, "liger_kernel_config": config}
    with pytest.raises((ValueError, ImportError), match="fused_linear_cross_entropy"):
        trainer_of(tmp_path, texts(), settings, scores=WEIGHTS)


class PassesOn(SFTTrainer):
    """Adds a term of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss + 0.0 * next(self.model.parameters()).sum()


class Forgets(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class Focal(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        log_probs = model(**inputs, fused_lm_head=True).log_probs
        return -(log_probs * (1 - log_probs.exp()) ** 2).sum() / num_items_in_batch


class FromLogits(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class OwnOutputs(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


def subclass_trainer(folder, cls, gradients):
    arguments = train_worker.hf_arguments(SFTConfig, batch_size=2, steps=4, bf16=False)
    return type(cls.__name__, (FlowSFTTrainer, cls), {})(
        tiny.make_model(),
        arguments,
        train_dataset=texts(),
        processing_class=tokenizer(),
        scores=WEIGHTS,
        callbacks=[train_worker.record_gradients(gradients)],
    )


def test_a_loss_of_a_class_between_may_add_terms(tmp_path):
    gradients = []
    subclass_trainer(tmp_path, PassesOn, gradients).train()
    tiny.assert_same_gradient(gradients[0], gradient_by_hand(rows_of(texts()), WEIGHTS))


@pytest.mark.parametrize("cls", [Forgets, Focal, FromLogits, OwnOutputs])
def test_another_loss_of_a_class_between_is_refused(tmp_path, cls):
    with pytest.raises(ValueError, match=f"compute_loss of {cls.__name__} is not SFTTrainer's sum"):
        subclass_trainer(tmp_path, cls, []).train()


def test_a_distillation_loss_is_refused(tmp_path):
    gkd = pytest.importorskip("trl.experimental.gkd", reason="this TRL has no GKDTrainer")

    class Distils(FlowSFTTrainer, gkd.GKDTrainer):
        pass

    arguments = train_worker.hf_arguments(gkd.GKDConfig, batch_size=N, steps=1, bf16=False)
    trainer = Distils(
        tiny.make_model(),
        args=arguments,
        teacher_model=tiny.make_model(1),
        train_dataset=chats(),
        processing_class=tokenizer(),
        scores=WEIGHTS,
    )
    with pytest.raises(ValueError, match="is not SFTTrainer's sum of log-probabilities"):
        trainer.train()
