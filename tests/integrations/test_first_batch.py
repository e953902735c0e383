"""The model's own loss: what a Trainer on the weights trains on, against loops written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    DataCollatorWithFlattening,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from flowdata import LossScorer
from flowdata.integrations.first_batch import Decision, decide, merged
from flowdata.integrations.trainer_loss import RunLoss
from flowdata.integrations.transformers import FlowTrainer
from flowdata.losses import causal_lm_loss
from tests.integrations import strange_models as strange
from tests.integrations.strange_models import WEIGHTS, N
from tests.interpreted import check_in_interpreter


def arguments(folder, **options):
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 0.0,
        "logging_strategy": "no",
        **options,
    }
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )


def seeded(make):
    torch.manual_seed(0)
    return make()


def gradient_of(model):
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    pairs = zip(gradients, model.parameters(), strict=True)
    return torch.cat([g.detach().float().flatten() for g, p in pairs if p.requires_grad])


class Recorder(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(gradient_of(model))


def trainer_of(folder, make, samples, collate, settings=None, **options):
    return FlowTrainer(
        seeded(make),
        arguments(folder, **settings or {}),
        train_dataset=samples,
        data_collator=collate,
        **{"scores": WEIGHTS} | options,
    )


def trained(*case, **options):
    recorder = Recorder()
    trainer = trainer_of(*case, callbacks=[recorder], **options)
    trainer.train()
    return recorder.gradients[0], trainer


def by_hand(make, samples, collate, losses_of, normalize="count"):
    """The gradient of Σ weight · loss over the denominator, one sample at a time."""
    model = seeded(make).train()
    total, count = 0.0, 0.0
    for sample, weight in zip(samples, WEIGHTS, strict=True):
        losses, targets = losses_of(model, collate([sample]))
        total = total + weight * losses.sum()
        count += (weight if normalize == "weights" else 1) * targets.sum()
    (total / count).backward()
    return gradient_of(model)


def assert_same(gradient, expected):
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", list(strange.SAME))
def test_gradients_are_those_of_a_loop_by_hand(tmp_path, kind):
    make, samples, collate, losses_of, *settings = strange.SAME[kind]
    for normalize in ("count", "weights"):
        gradient, _ = trained(tmp_path, make, samples, collate, *settings, normalize=normalize)
        assert_same(gradient, by_hand(make, samples, collate, losses_of, normalize))


REFUSED = {
    "class weights": (lambda: strange.Classifier(weight=torch.tensor([1.0, 2.0, 3.0])), "LABELLED"),
    "smoothing": (lambda: strange.Classifier(label_smoothing=0.1), "LABELLED"),
    "a new head, class weights": (
        lambda: strange.Classifier(zero=True, weight=torch.tensor([1.0, 2.0, 3.0])),
        "LABELLED",
    ),
    "a new head, smoothing": (
        lambda: strange.Classifier(zero=True, label_smoothing=0.1),
        "LABELLED",
    ),
    "smoothing in training alone": (
        lambda: strange.Classifier(only_in_training=True, label_smoothing=0.1),
        "LABELLED",
    ),
    "a replaced loss_function": (strange.replaced_loss, "LANGUAGE"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_a_loss_that_the_weights_would_drop_is_refused_with_both_numbers(tmp_path, kind):
    make, name = REFUSED[kind]
    trainer = trainer_of(tmp_path, make, getattr(strange, name), strange.collate)
    with pytest.raises(ValueError, match="unweighted loss of the first batch") as error:
        trainer.train()
    assert "the model's own is" in str(error.value)
    assert "pass loss= another name, a callable (outputs, batch)" in str(error.value)


def test_a_loss_that_no_name_fits_is_refused(tmp_path):
    questions = trainer_of(
        tmp_path, lambda: strange.bert("QuestionAnswering"), strange.QUESTIONS, strange.collate
    )
    with pytest.raises(ValueError, match=r"own loss of the first batch is [\d.]+, and no loss by"):
        questions.train()
    speech = trainer_of(tmp_path, lambda: strange.speech("mean"), strange.WAVES, strange.stacked)
    with pytest.raises(ValueError, match="don't fit its labels by any of the losses"):
        speech.train()


def twice(model, batch):
    losses, counts = strange.by(strange.shifted)(model, batch)
    return 2 * losses, counts


OWN = {
    "smoothing": (
        lambda: strange.Classifier(label_smoothing=0.1),
        strange.LABELLED,
        strange.collate,
        lambda m, b: (m(**b)["loss"], torch.ones(1)),
    ),
    "a replaced loss_function": (
        strange.replaced_loss,
        strange.LANGUAGE,
        strange.collate,
        lambda m, b: (
            2 * strange.by(strange.shifted)(m, b)[0],
            strange.by(strange.shifted)(m, b)[1],
        ),
    ),
    "questions": (
        lambda: strange.bert("QuestionAnswering"),
        strange.QUESTIONS,
        strange.collate,
        strange.questions,
    ),
    "speech": (
        lambda: strange.speech("mean"),
        strange.WAVES,
        strange.stacked,
        lambda m, b: (m(**b).loss, torch.ones(1)),
    ),
    "a decoder": (
        llama := strange.llama,
        strange.LANGUAGE,
        strange.collate,
        strange.by(strange.shifted),
    ),
}


@pytest.mark.parametrize("kind", list(OWN))
def test_the_models_own_loss_is_taken_sample_by_sample(tmp_path, kind):
    make, samples, collate, losses_of = OWN[kind]
    for normalize in ("count", "weights"):
        gradient, _ = trained(tmp_path, make, samples, collate, loss="own", normalize=normalize)
        assert_same(gradient, by_hand(make, samples, collate, losses_of, normalize))


def test_an_own_loss_that_is_no_mean_over_samples_is_refused(tmp_path):
    for make, samples, collate in (
        (lambda: strange.speech("sum"), strange.WAVES, strange.stacked),
        (REFUSED["class weights"][0], strange.LABELLED, strange.collate),
    ):
        trainer = trainer_of(tmp_path, make, samples, collate, loss="own")
        with pytest.raises(ValueError, match="the batch's loss is no mean over samples"):
            trainer.train()


def test_batches_whose_samples_count_alike_leave_the_unit_open(tmp_path):
    """A first batch of one sample, or of equally long ones, doesn't tell tokens from samples."""
    for size in (1, 2):
        ids = torch.randint(1, strange.VOCABULARY, (2, 5))
        samples = [{"input_ids": each, "labels": each} for each in ids] + strange.LANGUAGE[2:]
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": N // size}
        settings["train_sampling_strategy"] = "sequential"
        case = strange.llama, samples, strange.collate
        gradient, trainer = trained(tmp_path, *case, settings, loss="own")
        assert_same(gradient, by_hand(*case, strange.by(strange.shifted)))
        assert not trainer._decision.is_settled


def test_an_own_loss_is_refused_where_samples_share_statistics(tmp_path):
    case = tmp_path, CountsCalls, strange.IMAGES, strange.stacked
    with pytest.raises(ValueError, match="BatchNorm layers in training mode"):
        trainer_of(*case, loss="own").train()


class FurtherLosses(nn.Module):
    """Losses that have no name here, each a mean over samples."""

    def __init__(self, name):
        super().__init__()
        self.layer, self.name = nn.Linear(4, 3), name

    def forward(self, x, labels=None):
        logits = self.layer(x)
        if self.name == "absolute":
            return {"loss": F.l1_loss(logits, labels), "logits": logits}
        if self.name == "positives weighted":
            options = {"pos_weight": torch.tensor([3.0, 1.0, 1.0])}
            loss = F.binary_cross_entropy_with_logits(logits, labels, **options)
            return {"loss": loss, "logits": logits}
        losses = F.cross_entropy(logits, labels.long()[:, 0], reduction="none")
        return {"loss": ((1 - (-losses).exp()) ** 2 * losses).mean(), "logits": logits}


@pytest.mark.parametrize("name", ["absolute", "positives weighted", "focal"])
def test_further_losses_are_refused_by_name_and_taken_as_own(tmp_path, name):
    samples = [{"x": torch.randn(4), "labels": (torch.arange(3) + i) % 2 * 1.0} for i in range(N)]
    case = (lambda: FurtherLosses(name)), samples, strange.stacked
    with pytest.raises(ValueError, match=r"the model's own (is|loss of the first batch is)"):
        trainer_of(tmp_path, *case).train()
    gradient, _ = trained(tmp_path, *case, loss="own")

    def alone(model, batch):
        return model(**batch)["loss"], torch.ones(1)

    assert_same(gradient, by_hand(*case, alone))


def smoothed(outputs, batch):
    return F.cross_entropy(
        outputs["logits"], batch["labels"], label_smoothing=0.1, reduction="none"
    )


def test_a_function_of_outputs_is_taken_by_trainer_and_scorer_alike(tmp_path):
    make, samples, collate, losses_of = OWN["smoothing"]
    gradient, _ = trained(tmp_path, make, samples, collate, loss=smoothed)
    assert_same(gradient, by_hand(make, samples, collate, losses_of))
    model = seeded(make).eval()
    scores = LossScorer(model, smoothed, progress=False).score(samples, collate_fn=collate)
    expected = torch.stack([model(**collate([sample]))["loss"] for sample in samples])
    torch.testing.assert_close(scores.losses, expected.detach())
    make, samples, collate, losses_of = OWN["questions"]
    gradient, _ = trained(tmp_path, make, samples, collate, loss=strange.question_loss)
    assert_same(gradient, by_hand(make, samples, collate, losses_of))


def test_a_name_has_to_agree_too(tmp_path):
    case = tmp_path, strange.llama, strange.LANGUAGE, strange.collate
    gradient, _ = trained(*case, loss="causal_lm")
    assert_same(gradient, by_hand(*case[1:], strange.by(strange.shifted)))
    with pytest.raises(ValueError, match="by loss='masked_lm', and the model's own is"):
        trainer_of(*case, loss="masked_lm").train()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("nll", "loss must be 'auto', one of 'causal_lm', .* got 'nll'"),
        (lambda model, batch: 0, r"loss= takes \(outputs, batch\)"),
    ],
)
def test_what_is_no_loss_of_a_trainer_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        FlowTrainer(None, loss=loss)
    data = [{"x": 0.0}] * len(WEIGHTS)
    with pytest.raises(ValueError, match="resample=True leaves the loss to the Trainer"):
        FlowTrainer(None, loss="own", resample=True, train_dataset=data, scores=WEIGHTS)


def test_without_a_loss_what_can_mean_two_things_is_refused(tmp_path):
    numbers = [s | {"labels": torch.tensor(i % 2 * 1.0)} for i, s in enumerate(strange.NUMBERS)]
    case = tmp_path, lambda: strange.Regression(has_loss=False), numbers, strange.stacked
    with pytest.raises(ValueError, match="can be answers, yes or no, or numbers"):
        trainer_of(*case).train()
    gradient, _ = trained(*case, loss="mse")
    assert_same(gradient, by_hand(*case[1:], strange.squares))

    class NoLoss(strange.Pixels):
        def forward(self, x, labels=None):
            return {"logits": self.layer(x)}

    with pytest.raises(ValueError, match="either axis could be the classes'"):
        trainer_of(tmp_path, NoLoss, strange.FRAMES, strange.stacked).train()
    tags = tmp_path, lambda: strange.Tokens(50, "none"), strange.TAGS, strange.without_mask
    with pytest.raises(ValueError, match="neither its tokens nor the next ones; say what they"):
        trainer_of(*tags).train()
    gradient, _ = trained(*tags, loss="cross_entropy")
    assert_same(gradient, by_hand(*tags[1:], strange.by(strange.in_place)))


def test_outputs_of_several_tensors_need_a_function(tmp_path):
    class Features(strange.Tokens):
        def forward(self, input_ids, labels=None):
            features = self.features(input_ids)
            logits = self.head(features)
            return self.loss(logits, labels), features, logits

    case = tmp_path, Features, strange.LANGUAGE, strange.without_mask
    with pytest.raises(ValueError, match="no loss by name can be made of its outputs"):
        trainer_of(*case).train()

    def loss(outputs, batch):
        losses, counts = strange.shifted(outputs[2], batch["labels"])
        return losses / counts

    def alone(model, batch):
        losses, counts = strange.shifted(model(**batch)[2], batch["labels"])
        return losses / counts, torch.ones(1)

    gradient, _ = trained(*case, loss=loss)
    assert_same(gradient, by_hand(*case[1:], alone))


class Routed(strange.Tokens):
    """Adds a further term to its loss, and may name it."""

    def __init__(self, name="z_loss"):
        super().__init__()
        self.name = name

    def forward(self, input_ids, labels=None):
        outputs = super().forward(input_ids, labels)
        term = 1e-2 * outputs["logits"].logsumexp(-1).square().mean()
        outputs["loss"] = outputs["loss"] + term
        return outputs | ({self.name: term} if self.name else {})


def mixtral():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    router = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=strange.VOCABULARY, **sizes, **heads, **router)
    )


@pytest.mark.parametrize(
    ("make", "term_of", "collate"),
    [
        (mixtral, lambda outputs: 0.5 * outputs.aux_loss, strange.collate),
        (Routed, lambda outputs: outputs["z_loss"], strange.without_mask),
    ],
)
def test_terms_that_are_named_apart_are_kept(tmp_path, make, term_of, collate):
    settings = {"per_device_train_batch_size": N, "gradient_accumulation_steps": 1}
    gradient, _ = trained(tmp_path, make, strange.LANGUAGE, collate, settings)
    model, batch = seeded(make).train(), collate(strange.LANGUAGE)
    outputs = model(**batch)
    loss = causal_lm_loss(outputs["logits"], batch["labels"], WEIGHTS)
    (loss + term_of(outputs)).backward()
    assert_same(gradient, gradient_of(model))


def test_a_term_without_a_name_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, lambda: Routed(""), strange.LANGUAGE, strange.without_mask)
    with pytest.raises(ValueError, match="a further term …"):
        trainer.train()


@pytest.mark.parametrize("normalize", ["count", "weights"])
def test_a_flattened_batch_has_each_samples_weight_on_its_tokens(tmp_path, normalize):
    rows = [{"input_ids": ids.tolist()} for ids in strange.TOKENS]
    collate = DataCollatorWithFlattening(return_tensors="pt")

    def alone(model, batch):
        return strange.shifted(model(batch["input_ids"]).logits, batch["labels"])

    gradient, _ = trained(tmp_path, strange.llama, rows, collate, normalize=normalize)
    assert_same(gradient, by_hand(strange.llama, rows, collate, alone, normalize))


def test_a_flattened_batch_is_refused_by_a_loss_of_whole_samples(tmp_path):
    rows = [{"input_ids": ids.tolist()} for ids in strange.TOKENS]
    collate = DataCollatorWithFlattening(return_tensors="pt")
    for loss in ("own", lambda outputs, batch: outputs.logits.mean((1, 2))):
        trainer = trainer_of(tmp_path, strange.llama, rows, collate, loss=loss)
        with pytest.raises(ValueError, match="this loss has one value for each sample"):
            trainer.train()


class CountsCalls(nn.Module):
    """A convolutional network with running statistics that counts its forwards."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(4 * 36, strange.CLASSES)

    def forward(self, pixel_values, labels=None):
        type(self).calls += 1
        features = self.norm(self.layer(pixel_values)).flatten(1)
        logits = self.head(self.drop(features))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_the_comparison_costs_one_forward_and_leaves_no_trace(tmp_path):
    settings = {"max_steps": 6, "gradient_accumulation_steps": 1, "learning_rate": 1e-2}
    CountsCalls.calls = 0
    case = tmp_path, CountsCalls, strange.IMAGES, strange.stacked, settings
    flow = trainer_of(*case, scores=torch.ones(N))
    flow.train()
    assert CountsCalls.calls == 6 + 1
    plain = Trainer(
        seeded(CountsCalls),
        arguments(tmp_path, **settings),
        train_dataset=strange.IMAGES,
        data_collator=strange.stacked,
    )
    plain.train()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(flow.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_each_run_decides_anew(tmp_path):
    CountsCalls.calls = 0
    settings = {"max_steps": 1, "gradient_accumulation_steps": 1}
    trainer = trainer_of(tmp_path, CountsCalls, strange.IMAGES, strange.stacked, settings)
    trainer.train()
    trainer.train()
    assert CountsCalls.calls == 2 * (1 + 1)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    def run(folder, resume=None):
        trainer = trainer_of(
            folder,
            CountsCalls,
            strange.IMAGES,
            strange.stacked,
            {"max_steps": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-2},
        )
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = run(tmp_path)
    resumed = run(tmp_path, str(tmp_path / "checkpoint-2"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 12},
    ],
)
def test_the_trainers_own_options_change_nothing(tmp_path, settings):
    case = strange.llama, strange.LANGUAGE, strange.collate
    gradient, _ = trained(tmp_path, *case, settings)
    assert_same(gradient, by_hand(*case, strange.by(strange.shifted)))


@pytest.mark.parametrize("zero", [False, True])
def test_under_autocast_gradients_are_right_but_for_rounding(tmp_path, zero):
    def make():
        model = strange.bert("SequenceClassification", num_labels=strange.CLASSES)
        if zero:
            nn.init.zeros_(model.classifier.weight)
        return model

    case = make, strange.LABELLED, strange.collate
    settings = {"bf16": True, "max_steps": 2, "learning_rate": 1e-2}
    gradient, _ = trained(tmp_path, *case, settings)
    exact = by_hand(*case, strange.by(strange.in_place))
    assert (gradient - exact).abs().max() <= 0.02 * exact.abs().max()  # bfloat16 has 8 bits


def test_a_model_in_bfloat16_trains(tmp_path):
    def make():
        return strange.llama().bfloat16()

    case = make, strange.LANGUAGE, strange.collate
    gradient, _ = trained(tmp_path, *case)
    exact = by_hand(strange.llama, *case[1:], strange.by(strange.shifted))
    assert (gradient - exact).abs().max() <= 0.05 * exact.abs().max()


def without_targets(samples, count):
    """Copies of samples, of which the first `count` have no target."""
    samples = copy.deepcopy(samples)
    for sample in samples[:count]:
        sample["labels"] = torch.full_like(sample["labels"], -100)
    return samples


def test_a_first_batch_without_a_target_lets_the_next_one_decide(tmp_path):
    samples = without_targets(strange.LANGUAGE, 2)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    settings["train_sampling_strategy"] = "sequential"
    case = strange.llama, samples, strange.collate
    gradient, _ = trained(tmp_path, *case, settings)
    assert_same(gradient, by_hand(*case, strange.by(strange.shifted)))
    settings |= {"gradient_accumulation_steps": 1, "max_steps": 2}
    trainer = trainer_of(tmp_path, strange.replaced_loss, *case[1:], settings)
    with pytest.raises(ValueError, match="unweighted loss of the first batch"):
        trainer.train()


@pytest.mark.parametrize("is_whole_step", [False, True])
def test_a_first_batch_without_a_target_keeps_the_terms_named_apart(tmp_path, is_whole_step):
    samples = without_targets(strange.LANGUAGE, N if is_whole_step else N // 2)
    samples.append(strange.LANGUAGE[0])  # of a later step: data without any target is refused
    settings = {"per_device_train_batch_size": N // 2, "gradient_accumulation_steps": 2}
    settings["train_sampling_strategy"] = "sequential"
    weights = torch.cat([WEIGHTS, torch.ones(1)])
    gradient, _ = trained(tmp_path, mixtral, samples, strange.collate, settings, scores=weights)
    model, batch = seeded(mixtral).train(), strange.collate(samples[:N])
    loss = causal_lm_loss(model(**batch).logits, batch["labels"], WEIGHTS)
    halves = (strange.collate(samples[half]) for half in (slice(N // 2), slice(N // 2, N)))
    terms = [0.5 * model(**half).aux_loss for half in halves]
    (loss + sum(terms) / 2).backward()
    assert_same(gradient, gradient_of(model))


def test_a_first_batch_without_a_target_names_no_loss_for_the_others(tmp_path):
    samples = without_targets(strange.TAGS, 2)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    settings["train_sampling_strategy"] = "sequential"
    case = lambda: strange.Tokens(5, "in place"), samples, strange.without_mask
    gradient, _ = trained(tmp_path, *case, settings)
    assert_same(gradient, by_hand(*case, strange.by(strange.in_place)))


def test_evaluation_before_training_and_prediction_are_the_models_own(tmp_path):
    make = REFUSED["smoothing"][0]
    case = tmp_path, make, strange.LABELLED, strange.collate
    trainer = trainer_of(*case, loss=smoothed, eval_dataset=strange.LABELLED)
    model, batch = seeded(make).eval(), strange.collate(strange.LABELLED)
    expected = pytest.approx(model(**batch)["loss"].item(), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == expected
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == expected  # the rate is 0
    assert trainer.predict(strange.LABELLED).metrics["test_loss"] == expected


def test_a_model_made_anew_for_each_run(tmp_path):
    def make(trial=None):
        return seeded(strange.SAME["classes"][0])

    recorder = Recorder()
    FlowTrainer(
        args=arguments(tmp_path),
        model_init=make,
        train_dataset=strange.LABELLED,
        scores=WEIGHTS,
        data_collator=strange.collate,
        callbacks=[recorder],
    ).train()
    expected = by_hand(*strange.SAME["classes"])
    assert_same(recorder.gradients[0], expected)


def test_a_loss_computed_by_hand_decides_as_well(tmp_path):
    case = strange.SAME["tagger"]
    trainer = trainer_of(tmp_path, *case[:3])
    trainer.model.train()
    batch = strange.collate(strange.TAGS) | {"weight": WEIGHTS}
    trainer.compute_loss(trainer.model, batch).backward()
    assert_same(gradient_of(trainer.model), by_hand(*case))


def test_ranks_train_on_one_loss():
    causal, masked = RunLoss("causal_lm"), RunLoss("masked_lm")
    empty = Decision(masked, is_settled=False, is_known=False)
    assert merged([Decision(causal), empty]) == Decision(causal, is_settled=False)
    with pytest.raises(ValueError, match="call for different losses, 'causal_lm' and 'masked_lm'"):
        merged([Decision(causal), Decision(masked)])


def test_ligers_kernels_change_nothing():
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    pytest.importorskip("liger_kernel", reason="Liger is not installed (pip install liger-kernel)")
    check_in_interpreter("tests/integrations/test_liger.py")


@pytest.mark.parametrize("make", [strange.NoLogitsWithLabels, strange.LossOverLogits])
def test_a_second_call_draws_the_same_dropout(make):
    class Drops(make):
        def features(self, input_ids):
            return F.dropout(super().features(input_ids), 0.5, self.training)

    batch = strange.without_mask(strange.LANGUAGE)
    decision = decide(seeded(Drops).train(), batch, "auto", N)
    assert (decision.run.loss, decision.run.passes_labels) == ("causal_lm", False)


def test_probabilities_of_a_model_without_a_loss_are_refused():
    class Probabilities(strange.Tokens):
        def forward(self, input_ids):
            return self.head(self.features(input_ids)[:, -1]).softmax(1)

    batch = {"input_ids": torch.arange(8).view(4, 2), "labels": torch.arange(4) % 3}
    with pytest.raises(ValueError, match="the model returns probabilities"):
        decide(seeded(lambda: Probabilities(3)).train(), batch, "auto", 4)


def test_large_logits_are_compared_by_their_losses_alone(monkeypatch):
    from flowdata.integrations import first_batch

    monkeypatch.setattr(first_batch, "_MOST_LOGITS", 1)
    batch = strange.collate(strange.LANGUAGE)
    decision = decide(seeded(strange.llama).train(), batch, "auto", N)
    assert decision.run.loss == "causal_lm"
    assert decision.is_settled
    with pytest.raises(ValueError, match="unweighted loss of the first batch"):
        decide(seeded(strange.replaced_loss).train(), batch, "auto", N)
