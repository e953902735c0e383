"""Weights through what TRL's trainers do to their data: the rows drawn are the rows weighed."""

import collections

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on needs Python 3.11")

from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from flowdata import FlowSampler
from flowdata.integrations.transformers import FlowTrainerMixin
from flowdata.integrations.trl import FlowSFTTrainer
from tests.integrations import tiny


def config(cls, folder, **options):
    options = {"per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 1} | options
    return cls(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )


def sft(folder, settings=(), cls=FlowSFTTrainer, **options):
    options = {"train_dataset": tiny.as_hf_dataset(tiny.make_samples())} | options
    arguments = config(SFTConfig, folder, **dict(settings))
    return cls(tiny.make_model(), arguments, processing_class=tiny.make_tokenizer(), **options)


def one_hot(index, count=tiny.N):
    return torch.eye(count)[index]


class Rows(TrainerCallback):
    """Counts the rows that a trainer's loader yields, by their tokens."""

    def __init__(self):
        self.rows = collections.Counter()

    def watch(self, trainer, field="input_ids"):
        collate = trainer.data_collator

        def watched(samples):
            for sample in samples:
                tokens = torch.as_tensor(sample[field])
                self.rows[tuple(tokens.tolist())] += 1
            return collate(samples)

        trainer.data_collator = watched
        return self


PREPARATIONS = {
    "plain": {},
    "shuffled": {"shuffle_dataset": True},
    "filtered": {"max_length": 3},
    "filtered and shuffled": {"max_length": 3, "shuffle_dataset": True},
    "padding-free": {"padding_free": True, "max_length": None, "shuffle_dataset": True},
    "unused columns kept": {"remove_unused_columns": False, "shuffle_dataset": True},
    "processes": {"dataset_num_proc": 2, "max_length": 3},
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_resampling_draws_the_rows_that_were_weighed(tmp_path, name):
    settings = PREPARATIONS[name]
    samples = tiny.make_samples()
    longest = settings.get("max_length")
    for index in (9, 22):
        assert longest is None or (samples[index]["labels"][:longest] != -100).any()
        trainer = sft(tmp_path, settings, scores=one_hot(index), resample=True)
        rows = Rows().watch(trainer)
        trainer.train()
        assert list(rows.rows) == [tuple(samples[index]["input_ids"][:longest].tolist())]
        assert "weight" not in trainer.train_dataset.column_names


def test_resampling_text_draws_by_the_weights_of_the_texts(tmp_path):
    texts = [f"w{1 + i} w{2 + i} w3" for i in range(12)]
    data = Dataset.from_dict({"text": texts})
    weights = torch.zeros(12)
    weights[[2, 7]] = torch.tensor([1.0, 3.0])
    trainer = sft(
        tmp_path,
        {"shuffle_dataset": True, "max_steps": 24},
        train_dataset=data,
        scores=weights,
        resample=True,
        formatting_func=lambda example: "w9 " + example["text"],
    )
    rows = Rows().watch(trainer)
    trainer.train()
    drawn = {tokens[:2]: count for tokens, count in rows.rows.items()}
    assert drawn == {(9, 3): 24, (9, 8): 72}


def test_resampled_training_is_that_of_the_drawn_rows_by_hand(tmp_path):
    """The order is FlowSampler's over the prepared rows, and the loss SFTTrainer's own."""
    weights = tiny.make_weights()
    flow = sft(tmp_path, {"shuffle_dataset": True}, scores=weights, resample=True)
    prepared = sft(
        tmp_path, {"shuffle_dataset": True}, train_dataset=flow_column(weights), scores=None
    ).train_dataset
    sampler = FlowSampler(torch.tensor(prepared["weight"][:]), seed=42, num_replicas=1, rank=0)
    order = [i for epoch in range(1) for i in sampler]
    drawn = prepared.select(order).remove_columns("weight")
    by_hand = sft(
        tmp_path,
        {"train_sampling_strategy": "sequential"},
        cls=SFTTrainer,
        train_dataset=drawn,
    )
    assert curve(flow) == pytest.approx(curve(by_hand), rel=1e-6)


def flow_column(weights):
    return tiny.as_hf_dataset(tiny.make_samples(), weight=weights.tolist())


def curve(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_packs_are_not_resampled(tmp_path):
    for strategy in ("bfd", "wrapped"):
        settings = {"packing": True, "max_length": 64, "packing_strategy": strategy}
        with pytest.raises(ValueError, match=r"tokens of several samples.*use padding_free=True"):
            sft(tmp_path, settings, scores=torch.ones(tiny.N), resample=True)


def test_a_stream_is_not_resampled(tmp_path):
    stream = tiny.as_hf_dataset(tiny.make_samples()).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"resample=True needs a data set with a length"):
        sft(tmp_path, train_dataset=stream, scores=torch.ones(tiny.N), resample=True)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("eval_packing", [None, True, False])
def test_evaluation_sets_of_any_name_are_evaluated_as_ever(tmp_path, packing, eval_packing):
    data = tiny.as_hf_dataset(tiny.make_samples())
    text = Dataset.from_dict({"text": ["w1 w2 w3", "w4 w5"]})
    weighed = tiny.as_hf_dataset(tiny.make_samples(), weight=[0.5] * tiny.N)
    settings = {"packing": packing, "eval_packing": eval_packing, "max_length": 64}
    plain, flow = (
        sft(
            tmp_path,
            settings,
            cls=cls,
            eval_dataset={"train": data, "weight": text, "eval": weighed},
            **options,
        )
        for cls, options in ((SFTTrainer, {}), (FlowSFTTrainer, {"scores": tiny.make_weights()}))
    )
    expected, metrics = plain.evaluate(), flow.evaluate()
    for name in ("train", "weight", "eval"):
        assert metrics[f"eval_{name}_loss"] == pytest.approx(
            expected[f"eval_{name}_loss"], rel=1e-6
        )
    assert flow.evaluate(weighed)["eval_loss"] == pytest.approx(
        plain.evaluate(data)["eval_loss"], rel=1e-6
    )


def test_one_data_set_may_be_trained_on_and_evaluated_on(tmp_path):
    data = flow_column(tiny.make_weights())
    for settings in ({}, {"packing": True, "max_length": 64}):
        flow = sft(tmp_path, settings, train_dataset=data, eval_dataset=data)
        plain = sft(tmp_path, settings, cls=SFTTrainer, eval_dataset=data.remove_columns("weight"))
        expected = plain.evaluate()["eval_loss"]
        assert flow.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


# --- trainers with a loss of their own -----------------------------------------------------------


class FlowDPOTrainer(FlowTrainerMixin, DPOTrainer):
    pass


class FlowKTOTrainer(FlowTrainerMixin, KTOTrainer):
    pass


class FlowRewardTrainer(FlowTrainerMixin, RewardTrainer):
    pass


class FlowGRPOTrainer(FlowTrainerMixin, GRPOTrainer):
    pass


def preferences(count=12):
    return Dataset.from_dict(
        {
            "prompt": [f"w1 w{1 + i}" for i in range(count)],
            "chosen": [" " + " ".join([f"w{1 + i}"] * (1 + 3 * i % 7)) for i in range(count)],
            "rejected": [f" w{20 + i}" for i in range(count)],
        }
    )


def labelled(count=12):
    data = preferences(count)
    label = [i % 2 == 0 for i in range(count)]
    return (
        data.remove_columns("rejected")
        .rename_column("chosen", "completion")
        .add_column("label", label)
    )


def reward_model():
    torch.manual_seed(0)
    settings = tiny.make_model().config.to_dict() | {"num_labels": 1}
    return LlamaForSequenceClassification(LlamaConfig(**settings))


def preference_trainer(folder, cls, settings=(), **options):
    if cls is not FlowRewardTrainer:
        options["ref_model"] = tiny.make_model()
    if cls is FlowRewardTrainer:
        model, data = reward_model(), preferences().remove_columns("prompt")
        arguments = config(RewardConfig, folder, max_length=5)
    elif cls is FlowKTOTrainer:
        model, data = tiny.make_model(), labelled()
        arguments = config(KTOConfig, folder, max_length=32, **dict(settings))
    else:
        model, data = tiny.make_model(), preferences()
        arguments = config(DPOConfig, folder, max_length=32)
    tokenizer = tiny.make_tokenizer()
    return cls(model, args=arguments, train_dataset=data, processing_class=tokenizer, **options)


PREFERENCE = [FlowDPOTrainer, FlowKTOTrainer, FlowRewardTrainer]
FIELDS = {FlowDPOTrainer: "chosen_ids", FlowKTOTrainer: "completion_ids"}


@pytest.mark.parametrize("cls", PREFERENCE)
def test_a_preference_loss_refuses_weights_and_names_what_works(tmp_path, cls):
    name = cls.__bases__[1].__name__
    words = rf"{name} computes a loss of its own.*pass resample=True"
    with pytest.raises(ValueError, match=words):
        preference_trainer(tmp_path, cls, scores=torch.ones(12))
    with pytest.raises(ValueError, match=words):
        preference_trainer(tmp_path, cls, scores="auto")
    with pytest.raises(ValueError, match=words):
        preference_trainer(tmp_path, cls, scores=torch.ones(12), loss=lambda outputs, batch: 0)
    with pytest.raises(ValueError, match="this Trainer computes another one"):
        preference_trainer(tmp_path, cls, scores="auto", resample=True)


@pytest.mark.parametrize("cls", PREFERENCE)
def test_a_preference_trainer_draws_the_rows_that_were_weighed(tmp_path, cls):
    index = 7  # of those whose chosen reply is short enough for RewardTrainer's filter
    trainer = preference_trainer(tmp_path, cls, scores=one_hot(index, 12), resample=True)
    rows = Rows().watch(trainer, FIELDS.get(cls, "chosen_ids"))
    trainer.train()
    assert {tokens[0] for tokens in rows.rows} == {1 + index}
    if cls is FlowRewardTrainer:
        assert len(trainer.train_dataset) < 12
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in trainer.state.log_history[:-1])


def test_kto_pairs_the_replies_of_the_batch_that_was_drawn(tmp_path):
    flow = preference_trainer(tmp_path, FlowKTOTrainer, scores=torch.ones(12), resample=True)
    seen = []
    inner = flow.data_collator.collator

    def watched(samples):
        seen.append(samples)
        return inner(samples)

    flow.data_collator.collator = watched
    flow.train()
    assert len(seen) >= 8  # and what the loader reads ahead
    for samples in seen:
        replies = [sample["completion_ids"] for sample in samples]
        expected = [replies[-1], *replies[:-1]]
        assert [sample["KL_completion_ids"] for sample in samples] == expected
    arguments = {"precompute_ref_log_probs": True}
    with pytest.raises(ValueError, match="set precompute_ref_log_probs=False"):
        preference_trainer(
            tmp_path, FlowKTOTrainer, arguments, scores=torch.ones(12), resample=True
        )


def test_a_trainer_that_repeats_its_samples_is_not_resampled(tmp_path):
    arguments = config(GRPOConfig, tmp_path, num_generations=2, max_completion_length=4)
    options = {
        "reward_funcs": lambda completions, **kwargs: [0.0] * len(completions),
        "train_dataset": preferences().select_columns("prompt"),
        "processing_class": tiny.make_tokenizer(),
        "scores": torch.ones(12),
    }
    with pytest.raises(ValueError, match=r"GRPOTrainer computes a loss of its own"):
        FlowGRPOTrainer(tiny.make_model(), args=arguments, **options)
    with pytest.raises(ValueError, match=r"RepeatSampler, which groups or repeats .*\.select\("):
        FlowGRPOTrainer(tiny.make_model(), args=arguments, resample=True, **options)


def test_the_mixin_alone_does_not_weigh_sft_trainers_loss(tmp_path):
    class Mixed(FlowTrainerMixin, SFTTrainer):
        pass

    with pytest.raises(ValueError, match=r"use flowdata\.integrations\.trl\.FlowSFTTrainer"):
        sft(tmp_path, cls=Mixed, scores=torch.ones(tiny.N))


def test_a_users_own_compute_loss_is_not_replaced_in_silence(tmp_path):
    from transformers import TrainingArguments

    class Halved(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) / 2

    class FlowHalved(FlowTrainerMixin, Halved):
        pass

    arguments = config(TrainingArguments, tmp_path)
    options = {"train_dataset": tiny.make_samples(), "data_collator": tiny.collate}
    with pytest.raises(ValueError, match=r"Halved computes a loss of its own.*loss="):
        FlowHalved(tiny.make_model(), arguments, scores=torch.ones(tiny.N), **options)


def test_a_data_set_made_anew_without_the_weights_is_refused(tmp_path):
    class Rebuilt(SFTTrainer):
        def _prepare_dataset(self, dataset, *args):
            return super()._prepare_dataset(dataset, *args).select_columns(["input_ids", "labels"])

    class FlowRebuilt(FlowTrainerMixin, Rebuilt):
        pass

    with pytest.raises(ValueError, match="did not come along in a column 'weight'"):
        sft(tmp_path, cls=FlowRebuilt, scores=torch.ones(tiny.N), resample=True)
