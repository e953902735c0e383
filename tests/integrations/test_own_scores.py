"""scores="auto": a trainer scores what it feeds itself, once, and trains on that."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from flowdata import LossScorer, ScoreMismatchError, flow_weights
from flowdata.integrations.transformers import FlowTrainer
from flowdata.store.folder import read_manifest
from tests import reference
from tests.integrations import tiny, train_worker


def arguments(folder, cls=TrainingArguments, **options):
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "max_grad_norm": 0.0} | options
    return cls(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )


def flow(folder, train_dataset, cls=FlowTrainer, settings=(), **options):
    options = {"scores": "auto", "store": folder / "scores"} | options
    model = options.pop("model", None) or tiny.make_model()
    return cls(model, arguments(folder, **dict(settings)), train_dataset=train_dataset, **options)


def losses_by_hand(samples, model=None):
    model = tiny.make_model() if model is None else model
    return torch.tensor([reference.causal_lm_sample_loss(model.eval(), s)[0] for s in samples])


def hf(**columns):
    return tiny.as_hf_dataset(tiny.make_samples(), **columns)


@pytest.mark.parametrize("kind", ["list", "table"])
def test_one_line_scores_and_trains(tmp_path, kind):
    samples = tiny.make_samples()
    data = samples if kind == "list" else hf().with_format("torch")
    gradients = []
    trainer = flow(
        tmp_path,
        data,
        data_collator=tiny.collate,
        settings={"per_device_train_batch_size": tiny.N},
        callbacks=[train_worker.record_gradients(gradients)],
    )
    assert torch.allclose(trainer.scores.losses, losses_by_hand(samples), rtol=1e-3)
    trainer.train()
    expected = tiny.full_batch_gradient(trainer.scores.weights())
    tiny.assert_same_gradient(gradients[0], expected)


def test_a_second_trainer_finds_the_losses_of_the_first(tmp_path):
    first = flow(tmp_path, hf(), data_collator=pad)
    before = {path: path.read_bytes() for path in (tmp_path / "scores").iterdir() if path.is_file()}
    again = flow(tmp_path, hf(), data_collator=pad, temperature=1.0)
    after = {path: path.read_bytes() for path in (tmp_path / "scores").iterdir() if path.is_file()}
    assert before == after
    assert torch.equal(first.scores.losses, again.scores.losses)
    assert not torch.equal(first.train_dataset.weights, again.train_dataset.weights)
    other = [{**s, "input_ids": s["input_ids"].roll(1)} for s in tiny.make_samples()]
    with pytest.raises(ScoreMismatchError, match="another data set"):
        flow(tmp_path, tiny.as_hf_dataset(other), data_collator=pad)


def pad(samples):
    return tiny.collate([{k: torch.tensor(s[k]) for k in ("input_ids", "labels")} for s in samples])


def test_columns_that_the_trainer_removes_change_nothing(tmp_path):
    first = flow(tmp_path, hf(), data_collator=pad)
    wider = hf(note=["a"] * tiny.N, difficulty=list(range(tiny.N)))
    again = flow(tmp_path, wider, data_collator=pad)
    assert torch.equal(first.scores.losses, again.scores.losses)
    with pytest.raises(ScoreMismatchError, match="another data set"):  # forward takes it
        flow(
            tmp_path,
            hf(position_ids=[list(range(len(s["input_ids"]))) for s in hf()]),
            data_collator=pad,
        )


def test_a_collator_that_joins_samples_is_scored_one_by_one(tmp_path):
    gradients = []
    trainer = flow(
        tmp_path,
        hf(),
        data_collator=DataCollatorWithFlattening(),
        settings={"per_device_train_batch_size": tiny.N},
        callbacks=[train_worker.record_gradients(gradients)],
    )
    expected = losses_by_hand(tiny.make_samples())
    assert torch.allclose(trainer.scores.losses, expected, rtol=1e-3)
    trainer.train()
    gradient = tiny.full_batch_gradient(trainer.scores.weights())
    tiny.assert_same_gradient(gradients[0], gradient)


def test_labels_that_the_collator_makes_are_what_is_scored(tmp_path):
    collator = DataCollatorForLanguageModeling(tiny.make_tokenizer(), mlm=False)
    ids = [s["input_ids"] for s in tiny.make_samples()]
    data = Dataset.from_dict({"input_ids": [i.tolist() for i in ids]})
    trainer = flow(tmp_path, data, data_collator=collator)
    expected = losses_by_hand([{"input_ids": i, "labels": i} for i in ids])
    assert torch.allclose(trainer.scores.losses, expected, rtol=1e-3)
    trainer.train()


def test_samples_are_drawn_by_their_own_scores(tmp_path):
    trainer = flow(tmp_path, hf(), data_collator=pad, resample=True)
    weights = flow_weights(losses_by_hand(tiny.make_samples()))
    assert torch.allclose(trainer.scores.weights(), weights, rtol=1e-3)
    trainer.train()
    assert "weight" not in trainer.train_dataset.column_names


def test_what_can_not_be_scored_beforehand_is_refused(tmp_path):
    collator = DataCollatorForLanguageModeling(tiny.make_tokenizer(), mlm=False)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny.make_samples())

    for stream in (hf().to_iterable_dataset(), Stream()):
        with pytest.raises(ValueError, match="scores='auto' needs a data set with a length"):
            flow(tmp_path, stream, data_collator=collator)

    def shaken(samples):
        batch = pad(samples)
        batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 1, 2)
        return batch

    with pytest.raises(ValueError, match="other batches of the same samples each time"):
        flow(tmp_path, hf(), data_collator=shaken)
    with pytest.raises(ValueError, match="scores must be Scores, weights or 'auto', got 'scores/'"):
        flow(tmp_path, hf(), scores="scores/", store=None)
    with pytest.raises(ValueError, match="store= is where scores='auto' keeps its losses"):
        flow(tmp_path, hf(), scores=torch.ones(tiny.N))
    with pytest.raises(ValueError, match="carries weights"):
        flow(tmp_path, hf(weight=[1.0] * tiny.N))


def test_the_model_comes_back_as_it_was(tmp_path):
    model = tiny.make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = flow(tmp_path, hf(), data_collator=pad, model=model)
    assert trainer.model.training == Trainer(model, arguments(tmp_path)).model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- SFTTrainer -----------------------------------------------------------------------------------


def sft(folder, settings=(), train_dataset=None, **options):
    trl = pytest.importorskip("trl", minversion="1.15", reason="needs Python 3.11")
    from flowdata.integrations.trl import FlowSFTTrainer

    options = {"scores": "auto", "store": folder / "scores"} | options
    if options["scores"] is None:
        del options["scores"], options["store"]
    cls = options.pop("cls", FlowSFTTrainer)
    return cls(
        options.pop("model", None) or tiny.make_model(),
        arguments(folder, trl.SFTConfig, bf16=False, **dict(settings)),
        train_dataset=chats() if train_dataset is None else train_dataset,
        processing_class=tiny.make_tokenizer(),
        **options,
    )


def plain_sft(folder, settings=(), **options):
    trl = pytest.importorskip("trl", minversion="1.15", reason="needs Python 3.11")
    return sft(folder, settings, cls=trl.SFTTrainer, scores=None, **options)


def chats(**columns):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"w{3 + i} w{4 + i}"}],
            "completion": [
                {"role": "assistant", "content": " ".join(["w9", f"w{5 + i}"] * (i % 4))}
            ],
        }
        for i in range(12)
    ]
    data = Dataset.from_list(rows)
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data


SETTINGS = {
    "padded": {},
    "shuffled": {"shuffle_dataset": True},
    "cut": {"max_length": 8},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 16},
    "wrapped": {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
    "multiple": {"pad_to_multiple_of": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sft_scores_are_those_of_its_own_collator_by_hand(tmp_path, name):
    settings = SETTINGS[name]
    trainer = sft(tmp_path, settings)
    unpacked = {k: v for k, v in settings.items() if k not in ("packing", "padding_free")}
    unpacked = unpacked if name != "wrapped" else {}
    plain = plain_sft(tmp_path / "plain", unpacked)
    scorer = LossScorer(tiny.make_model(), progress=False)
    expected = scorer.score(plain.train_dataset, collate_fn=plain.data_collator)
    assert torch.equal(trainer.scores.losses, expected.losses)
    weights = expected.weights()
    if not settings.get("packing"):
        assert trainer.train_dataset["weight"][:] == pytest.approx(weights.tolist(), rel=1e-6)
    else:
        of_sample = {
            tuple(row["input_ids"]): weight.item()
            for row, weight in zip(plain.train_dataset, weights, strict=True)
        }
        tokens = sorted(
            (token, round(weight, 5))
            for row in trainer.train_dataset
            for token, weight in zip(row["input_ids"], row["weight"], strict=True)
        )
        assert (
            tokens == sorted((token, round(w, 5)) for ids, w in of_sample.items() for token in ids)
            or name == "wrapped"
        )
    assert all(label in row for row in trainer.train_dataset for label in ("input_ids", "labels"))
    trainer.train()


def test_sft_draws_by_its_own_scores(tmp_path):
    trainer = sft(tmp_path, {"shuffle_dataset": True}, resample=True)
    trainer.train()
    with pytest.raises(ValueError, match="use padding_free=True"):
        sft(tmp_path, {"packing": True}, resample=True)


def test_sft_scores_survive_new_columns_and_other_settings_of_training(tmp_path):
    first = sft(tmp_path)
    again = sft(tmp_path, {"learning_rate": 1.0}, chats(note=["x"] * 12), normalize="weights")
    assert torch.equal(first.scores.losses, again.scores.losses)
    assert len(read_manifest(tmp_path / "scores")["identity"]) > 3
    with pytest.raises(ScoreMismatchError, match="another data set"):
        sft(tmp_path, {"max_length": 8})


def test_sft_scores_are_found_by_another_process(tmp_path):
    script = (
        "import sys, json, pathlib; from tests.integrations.test_own_scores import sft\n"
        "trainer = sft(pathlib.Path(sys.argv[1]))\n"
        "print(json.dumps(trainer.scores.losses.tolist()))"
    )
    first = sft(tmp_path).scores.losses.tolist()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout.splitlines()[-1]) == first
    assert sft(tmp_path).scores.losses.tolist() == first


def test_sft_samples_that_are_cut_to_nothing_weigh_nothing(tmp_path):
    settings = {"packing": True, "max_length": 6}
    data = chats().select(range(4))
    trainer = sft(tmp_path, settings, data)
    assert trainer.scores.counts.min() == 0 or trainer.scores.losses.isfinite().all()
    trainer.train()


@pytest.mark.parametrize("kind", ["lora", "pissa", "prompt tuning"])
def test_the_pre_trained_model_is_scored_beneath_new_adapters(tmp_path, kind):
    peft = pytest.importorskip("peft")
    configs = {
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        "pissa": peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
        "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }
    trainer = sft(tmp_path, {"gradient_checkpointing": False}, peft_config=configs[kind])
    plain = sft(tmp_path, store=tmp_path / "plain")
    assert torch.allclose(trainer.scores.losses, plain.scores.losses, rtol=1e-3)
    trainer.train()


@pytest.mark.parametrize("kind", ["list", "table"])
def test_rows_of_text_are_refused_with_what_tokenises_them(tmp_path, kind):
    rows = [{"messages": [{"role": "assistant", "content": "yes"}]}] * 4
    data = rows if kind == "list" else Dataset.from_list(rows)
    with pytest.raises(ValueError, match="columns messages, and none that the model takes: token"):
        flow(tmp_path, data, data_collator=tiny.collate).train()


def test_rows_of_text_are_taken_where_a_loader_of_ones_own_tokenises_them(tmp_path):
    class OwnLoader(FlowTrainer):
        def get_train_dataloader(self):
            samples = [{**sample, "weight": torch.tensor(1.0)} for sample in tiny.make_samples(4)]
            return torch.utils.data.DataLoader(samples)

    rows, weights = [{"text": "yes"}] * 4, torch.rand(4)
    flow(tmp_path, rows, OwnLoader, store=None, scores=weights).train()


@pytest.mark.parametrize("resample", [False, True])
def test_rows_of_text_are_refused_with_weights_of_ones_own_too(tmp_path, resample):
    rows, weights = [{"prompt": "yes", "completion": "no"}] * 4, torch.rand(4)
    with pytest.raises(ValueError, match=r"columns prompt, completion, and none .* tokenise"):
        flow(tmp_path, rows, store=None, scores=weights, resample=resample)


@pytest.mark.parametrize("kind", ["list", "table"])
def test_rows_without_any_target_are_refused(tmp_path, kind):
    rows = [{**sample, "labels": sample["labels"] * 0 - 100} for sample in tiny.make_samples(4)]
    data = (
        rows
        if kind == "list"
        else Dataset.from_list(
            [{name: values.tolist() for name, values in row.items()} for row in rows]
        )
    )
    with pytest.raises(ValueError, match=r"none of the 4 rows of train_dataset has a target.*cut"):
        flow(tmp_path, data, data_collator=tiny.collate, store=None, scores=torch.rand(4))
    one = [*rows[:3], tiny.make_samples(4)[3]]
    flow(tmp_path, one, data_collator=tiny.collate, store=None, scores=torch.rand(4))
