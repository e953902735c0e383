"""token_rule="eaft" and ASFT (reference="base") in every trainer, against loops by hand."""

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("peft")
pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on needs Python 3.11")

import peft
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    TrainingArguments,
)
from trl import SFTConfig

from flowdata.integrations.transformers import FlowTrainer
from flowdata.integrations.trl import FlowSFTTrainer
from flowdata.losses import base_model
from tests import reference
from tests.integrations import tiny, train_worker

ASFT = {"token_rule": "dft", "kl_to_reference": 0.4, "reference": "base"}
EAFT = {"token_rule": "eaft"}
BOTH = {**EAFT, "kl_to_reference": 0.4, "reference": "base"}
SFT_AND_KL = {"kl_to_reference": 0.4, "reference": "base"}
PACKED = {"packing": True, "max_length": 64}
FREE = {"padding_free": True, "max_length": None}


def gemma():
    """A tied head whose logits are capped."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=tiny.VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=2.0,
            max_position_embeddings=64,
            pad_token_id=0,
            attn_implementation="eager",
        )
    )


def adapted(kind="lora", make=tiny.make_model):
    """A model whose adapters have moved."""
    torch.manual_seed(5)
    if kind == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    else:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(make(), config)


def by_hand(model, weights, options):
    """The gradient of the whole data set, one sample and one token at a time."""
    rule, strength = options.get("token_rule"), options.get("kl_to_reference", 0.0)
    total, items = 0.0, 0
    for index, sample in enumerate(tiny.make_samples()):
        ids, labels = sample["input_ids"][None], sample["labels"][None]
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :]
        base = logits.detach()
        if strength:
            with base_model(model):
                base = model(input_ids=ids).logits
        count = int((labels[:, 1:] != -100).sum())
        weight = None if weights is None else weights[index : index + 1]
        loss = reference.anchored_loss(logits, labels, weight, rule, strength, base)
        total, items = total + loss * count, items + count
    (total / items).backward()
    return tiny.flat_gradient(model)


def arguments(cls, folder, **settings):
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4} | settings
    return train_worker.hf_arguments(
        cls,
        settings.pop("per_device_train_batch_size"),
        settings.pop("gradient_accumulation_steps"),
        **settings,
    )


def trainer_gradient(folder, model, weights, options, **settings):
    gradients = []
    FlowTrainer(
        model,
        arguments(TrainingArguments, folder, **settings),
        train_dataset=tiny.make_samples(),
        data_collator=tiny.collate,
        scores=weights,
        callbacks=[train_worker.record_gradients(gradients)],
        **options,
    ).train()
    return gradients[0]


def sft_gradient(folder, model, weights, options, **settings):
    gradients = []
    settings = {"bf16": False, "gradient_checkpointing": False} | settings
    FlowSFTTrainer(
        model,
        arguments(SFTConfig, folder, **settings),
        train_dataset=tiny.as_hf_dataset(tiny.make_samples()),
        processing_class=tiny.make_tokenizer(),
        scores=weights,
        callbacks=[train_worker.record_gradients(gradients)],
        **options,
    ).train()
    return gradients[0]


@pytest.mark.parametrize("gradient_of", [trainer_gradient, sft_gradient])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [ASFT, EAFT, BOTH, SFT_AND_KL], ids=str)
def test_a_step_of_lora_is_that_of_a_loop_by_hand(tmp_path, gradient_of, options, weighted):
    weights = tiny.make_weights() if weighted else None
    expected = by_hand(adapted(), weights, options)
    tiny.assert_same_gradient(gradient_of(tmp_path, adapted(), weights, options), expected)


@pytest.mark.parametrize("gradient_of", [trainer_gradient, sft_gradient])
def test_a_tied_head_with_a_softcap(tmp_path, gradient_of):
    weights = tiny.make_weights()
    expected = by_hand(adapted(make=gemma), weights, BOTH)
    gradient = gradient_of(tmp_path, adapted(make=gemma), weights, BOTH)
    assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()
    expected = by_hand(gemma(), weights, EAFT)  # every parameter is trained
    gradient = gradient_of(tmp_path, gemma(), weights, EAFT)
    assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("gradient_of", [trainer_gradient, sft_gradient])
def test_virtual_tokens_stand_before_those_of_the_base(tmp_path, gradient_of):
    expected = by_hand(adapted("prompt"), tiny.make_weights(), BOTH)
    gradient = gradient_of(tmp_path, adapted("prompt"), tiny.make_weights(), BOTH)
    tiny.assert_same_gradient(gradient, expected)


@pytest.mark.parametrize("settings", [PACKED, FREE], ids=["packed", "padding-free"])
def test_packs_and_flat_rows_under_trl(tmp_path, settings):
    expected = by_hand(adapted(), tiny.make_weights(), BOTH)
    # All samples are one batch, however many packs they make.
    settings = settings | {"per_device_train_batch_size": tiny.N, "gradient_accumulation_steps": 1}
    gradient = sft_gradient(tmp_path, adapted(), tiny.make_weights(), BOTH, **settings)
    tiny.assert_same_gradient(gradient, expected)


def test_dropout_and_checkpointing_leave_the_base_alone(tmp_path):
    """At the start LoRA is its base whatever its dropout does, so that nothing holds it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)

    def new():
        torch.manual_seed(1)
        return peft.get_peft_model(tiny.make_model(), config)

    for gradient_of, settings in (
        (trainer_gradient, {}),
        (sft_gradient, {}),
        (sft_gradient, {"gradient_checkpointing": True}),
    ):
        torch.manual_seed(2)
        plain = gradient_of(tmp_path, new(), tiny.make_weights(), {"token_rule": "dft"}, **settings)
        torch.manual_seed(2)
        held = gradient_of(tmp_path, new(), tiny.make_weights(), ASFT, **settings)
        tiny.assert_same_gradient(held, plain)


def test_what_is_held_drifts_less(tmp_path):
    drifts = {}
    batch = tiny.collate(tiny.make_samples())
    fields = {key: value for key, value in batch.items() if key != "labels"}
    for strength in (None, 3.0):
        torch.manual_seed(1)
        model = peft.get_peft_model(tiny.make_model(), peft.LoraConfig(r=4))
        args = arguments(TrainingArguments, tmp_path, max_steps=12)
        args.learning_rate, args.optim = 1e-2, "adamw_torch"
        options = {} if strength is None else {"kl_to_reference": strength, "reference": "base"}
        FlowTrainer(
            model,
            args,
            train_dataset=tiny.make_samples(),
            data_collator=tiny.collate,
            token_rule="dft",
            **options,
        ).train()
        with base_model(model):
            base = model(**fields).logits
        logits = model.eval()(**fields).logits
        drifts[strength] = reference.divergences(base[:, 0], logits[:, 0])["kl"].mean()
    assert drifts[3.0] < 0.7 * drifts[None]


def test_evaluation_is_unheld_and_unweighted(tmp_path):
    samples = tiny.make_samples(8)
    losses = []
    for options in (ASFT, {"scores": torch.ones(8)}):
        trainer = FlowTrainer(
            adapted(),
            arguments(TrainingArguments, tmp_path),
            train_dataset=samples,
            eval_dataset=samples,
            data_collator=tiny.collate,
            **options,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_lightning_and_accelerate_take_the_same_lines(tmp_path):
    import lightning.pytorch as pl

    from flowdata import FlowWeightedDataset, causal_lm_loss
    from flowdata.collator import WeightedCollator
    from flowdata.integrations.accelerate import PreparedBatches
    from flowdata.integrations.lightning import FlowDataModule
    from flowdata.losses import count_items

    expected = by_hand(adapted(), tiny.make_weights(), BOTH)
    samples, weights = tiny.make_samples(), tiny.make_weights()

    def loss_of(model, batch, weight, num_items):
        fields = {key: value for key, value in batch.items() if key != "labels"}
        with base_model(model):
            base = model(**fields).logits
        options = {**BOTH, "reference": base, "num_items": num_items}
        return causal_lm_loss(model(**fields).logits, batch["labels"], weight, **options)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = adapted()

        def training_step(self, item, index):
            (batch, weight), num_items = item
            return loss_of(self.model, batch, weight, num_items)

        def on_before_optimizer_step(self, optimizer):
            self.gradient = tiny.flat_gradient(self.model)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Module()
    data = FlowDataModule(samples, weights, batch_size=8, collate_fn=tiny.collate)
    pl.Trainer(
        max_epochs=1,
        accumulate_grad_batches=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(module, data)
    tiny.assert_same_gradient(module.gradient, expected)

    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = adapted()
    weighted = FlowWeightedDataset(samples, weights, layout="dict")
    loader = DataLoader(weighted, 8, collate_fn=WeightedCollator(tiny.collate))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch, num_items in PreparedBatches(
        accelerator, loader, lambda b: count_items(b["labels"])
    ):
        with accelerator.accumulate(model):
            weight = batch.pop("weight")
            accelerator.backward(loss_of(model, batch, weight, num_items))
    tiny.assert_same_gradient(tiny.flat_gradient(model), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_to_reference": 0.1}, "needs reference=, which is 'base' here"),
        ({"reference": "base"}, "reference would be ignored without kl_to_reference="),
        ({**ASFT, "reference": "model"}, "reference must be 'base'.*got 'model'"),
        ({**ASFT, "kl_to_reference": -0.1}, "kl_to_reference must be finite and >= 0, got -0.1"),
        ({**SFT_AND_KL, "loss": "own"}, "kl_to_reference is for causal language models, whose"),
        ({**ASFT, "normalize": "weights"}, "token_rule with normalize='weights' would divide"),
    ],
)
@pytest.mark.parametrize("cls", [FlowTrainer, FlowSFTTrainer])
def test_options_that_cannot_be_right_are_refused(options, message, cls):
    with pytest.raises(ValueError, match=message):
        cls(adapted(), train_dataset=tiny.make_samples(), **options)


@pytest.mark.parametrize("gradient_of", [trainer_gradient, sft_gradient])
def test_a_model_without_a_base_is_refused_with_the_remedy(tmp_path, gradient_of):
    with pytest.raises(ValueError, match=r"got LlamaForCausalLM; train adapters.*OutputAnchor"):
        gradient_of(tmp_path, tiny.make_model(), tiny.make_weights(), ASFT)


def test_another_kind_of_model_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    lora = peft.LoraConfig(r=2, target_modules=["query"])
    model = peft.get_peft_model(BertForMaskedLM(config), lora)
    with pytest.raises(ValueError, match="kl_to_reference is for causal language models, not for"):
        trainer_gradient(tmp_path, model, tiny.make_weights(), SFT_AND_KL)


def test_a_head_whose_logits_trl_makes_otherwise_is_refused(tmp_path):
    model = gemma()
    model.config.logit_scale = 0.1  # TRL reads this for its head; the two read it alike
    model.config.logits_scaling = 3.0  # TRL ignores this one beside the other
    with pytest.raises(ValueError, match=r"differ by .* use FlowTrainer, which takes them from"):
        sft_gradient(tmp_path, model, tiny.make_weights(), EAFT)


def test_by_the_weights_is_right_where_no_rule_is(tmp_path):
    expected = by_hand(adapted(), tiny.make_weights(), SFT_AND_KL)
    samples = tiny.make_samples()
    counts = torch.tensor([int((s["labels"][1:] != -100).sum()) for s in samples])
    expected = expected * counts.sum() / (counts * tiny.make_weights()).sum()
    options = {**SFT_AND_KL, "normalize": "weights"}
    for gradient_of in (trainer_gradient, sft_gradient):
        gradient = gradient_of(tmp_path, adapted(), tiny.make_weights(), options)
        tiny.assert_same_gradient(gradient, expected)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny.make_model, {"modules_to_save": ["lm_head"]}),
        (gemma, {"trainable_token_indices": [3, 4]}),  # of the tied head, too
    ],
)
def test_a_head_that_is_trained_is_no_base(tmp_path, make, options):
    def new():
        torch.manual_seed(5)
        targets = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
        model = peft.get_peft_model(make(), peft.LoraConfig(**targets, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora" not in name:
                    parameter.add_(0.1)
        return model

    weights = tiny.make_weights()
    expected = by_hand(new(), weights, BOTH)
    gradient = trainer_gradient(tmp_path, new(), weights, BOTH)
    assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()
    # TRL's head itself can't read a layer of trainable tokens.
    error = AttributeError if make is gemma else ValueError
    with pytest.raises(error, match=r"output layer is trained.*or use FlowTrainer|'bias'"):
        sft_gradient(tmp_path, new(), weights, BOTH)


def test_bfloat16_is_trained_about_the_same(tmp_path):
    weights = tiny.make_weights()
    expected = by_hand(adapted(), weights, BOTH)
    gradient = sft_gradient(tmp_path, adapted(), weights, BOTH, bf16=True)
    assert (gradient - expected).norm() < 0.05 * expected.norm()


def sharp():
    """A model whose larger logits bfloat16 rounds by more than float32 ever does."""
    model = tiny.make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


@pytest.mark.parametrize("options", [EAFT, SFT_AND_KL, BOTH], ids=str)
def test_autocast_is_no_other_output_layer(tmp_path, options):
    expected = by_hand(adapted(make=sharp), tiny.make_weights(), options)
    model = adapted(make=sharp)
    gradient = sft_gradient(tmp_path, model, tiny.make_weights(), options, bf16=True)
    assert (gradient - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("gradient_of", [trainer_gradient, sft_gradient])
def test_adapters_that_have_not_moved_are_held_by_nothing_under_autocast(tmp_path, gradient_of):
    def gradient(**options):
        torch.manual_seed(1)
        model = peft.get_peft_model(sharp(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        return gradient_of(tmp_path, model, tiny.make_weights(), options, bf16=True)

    held = gradient(kl_to_reference=1e4, reference="base")
    assert torch.equal(held, gradient())


def test_adapters_that_trl_makes_and_scores_that_it_makes_itself(tmp_path):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    gradients = []
    options = {"callbacks": [train_worker.record_gradients(gradients)], **BOTH}
    trainer = FlowSFTTrainer(
        tiny.make_model(),
        arguments(SFTConfig, tmp_path, bf16=False, gradient_checkpointing=False),
        train_dataset=tiny.as_hf_dataset(tiny.make_samples()),
        processing_class=tiny.make_tokenizer(),
        peft_config=config,
        scores="auto",
        **options,
    )
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    model = peft.get_peft_model(tiny.make_model(), config)
    model.load_state_dict(state)
    tiny.assert_same_gradient(gradients[0], by_hand(model, trainer.scores.weights(), BOTH))
