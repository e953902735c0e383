"""FlowSFTTrainer on images: the collator tokenises, so that rows are samples until the batch."""

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Image, List

pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on needs Python 3.11")

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import SFTConfig

from flowdata.integrations.trl import FlowSFTTrainer
from flowdata.losses import base_model
from tests import reference
from tests.integrations import tiny, train_worker

N, SIDE, PATCH = 6, 8, 4
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(7))
TEMPLATE = (
    "{% for m in messages %}{{ 'w1 ' if m['role'] == 'user' else 'w2 ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{{ ' ' }}{% endfor %}{% endif %}"
    "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
)


def make_model():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = CLIPVisionConfig(
        **small, num_hidden_layers=2, image_size=SIDE, patch_size=PATCH, projection_dim=16
    )
    text = LlamaConfig(**small, num_hidden_layers=2, vocab_size=41, pad_token_id=0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=40)
    )


def make_processor():
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def pictures(kind):
    generator = np.random.default_rng(0)
    shades = generator.integers(0, 255, (N, SIDE, SIDE, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(shade) for shade in shades]
    replies = [" ".join([f"w{9 + i}"] * (1 + i % 4)) for i in range(N)]
    user = [{"role": "user", "content": f"w{3 + i}"} for i in range(N)]
    assistant = [{"role": "assistant", "content": reply} for reply in replies]
    if kind == "prompts":
        columns = {"prompt": [[u] for u in user], "completion": [[a] for a in assistant]}
    else:
        columns = {"messages": [[u, a] for u, a in zip(user, assistant, strict=True)]}
    if kind == "one image":
        data = Dataset.from_dict({**columns, "image": images})
        return data.cast_column("image", Image())
    data = Dataset.from_dict({**columns, "images": [[image] for image in images]})
    return data.cast_column("images", List(Image()))


def trainer_of(data, settings=(), gradients=None, **options):
    if gradients is not None:
        options["callbacks"] = [train_worker.record_gradients(gradients)]
    settings = {"batch_size": N, "steps": 1, "max_length": None} | dict(settings)
    return FlowSFTTrainer(
        make_model(),
        train_worker.hf_arguments(SFTConfig, **settings, bf16=False),
        train_dataset=data,
        processing_class=make_processor(),
        **options,
    )


def losses_by_hand(model, trainer, data):
    """Each sample alone, collated alone: the sum of its losses, and how many there are."""
    collate = getattr(trainer.data_collator, "collate_fn", trainer.data_collator)
    sums, counts = [], []
    for index in range(N):
        batch = collate([dict(data[index])])
        labels = batch.pop("labels")[0, 1:]
        logits = model(**batch).logits[0, :-1]
        sums.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        counts.append(int((labels != -100).sum()))
    return torch.stack(sums), torch.tensor(counts)


@pytest.mark.parametrize("kind", ["messages", "prompts", "one image"])
@pytest.mark.parametrize("settings", [{}, {"batch_size": 2, "steps": 3}], ids=["whole", "parts"])
def test_gradients_are_those_of_one_sample_at_a_time(kind, settings):
    data, gradients, by_hand = pictures(kind), [], make_model()
    trainer = trainer_of(data, settings, gradients, scores=WEIGHTS)
    trainer.train()
    sums, counts = losses_by_hand(by_hand, trainer, data)
    ((WEIGHTS * sums).sum() / counts.sum()).backward()
    tiny.assert_same_gradient(gradients[0], tiny.flat_gradient(by_hand))


def test_a_trainer_scores_its_pictures_itself(tmp_path):
    data = pictures("prompts")
    trainer = trainer_of(data, scores="auto", store=tmp_path / "scores")
    with torch.no_grad():
        sums, counts = losses_by_hand(make_model().eval(), trainer, data)
    assert torch.equal(trainer.scores.counts, counts)
    assert torch.allclose(trainer.scores.losses, sums / counts, rtol=2e-3)
    noted = data.add_column("note", ["x"] * N)
    again = trainer_of(noted, scores="auto", store=tmp_path / "scores")
    assert torch.equal(trainer.scores.losses, again.scores.losses)
    again.train()


def test_pictures_are_drawn_by_their_weights():
    data = pictures("messages")
    trainer = trainer_of(data, {"max_steps": 2}, scores=torch.eye(N)[4], resample=True)
    replies, collate = [], trainer.data_collator

    def watched(samples):
        replies.extend(sample["messages"][1]["content"] for sample in samples)
        return collate(samples)

    trainer.data_collator = watched
    trainer.train()
    assert set(replies) == {data[4]["messages"][1]["content"]}


def test_a_rule_of_entropies_and_a_divergence_see_the_images():
    """TRL's fused head stands behind the images' backbone, and so do the tiles of the rule."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    options = {"token_rule": "eaft", "kl_to_reference": 0.5, "reference": "base"}
    data, gradients = pictures("messages"), []
    trainer = trainer_of(data, (), gradients, scores=WEIGHTS, peft_config=config, **options)
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    model = peft.get_peft_model(make_model(), config)
    model.load_state_dict(state)
    collate = getattr(trainer.data_collator, "collate_fn", trainer.data_collator)
    total, items = 0.0, 0
    for index in range(N):
        batch = collate([dict(data[index])])
        labels = batch.pop("labels")
        with base_model(model):
            base = model(**batch).logits
        inputs = model(**batch).logits, labels, WEIGHTS[index : index + 1], "eaft", 0.5, base
        count = int((labels[:, 1:] != -100).sum())
        total, items = total + count * reference.anchored_loss(*inputs), items + count
    (total / items).backward()
    tiny.assert_same_gradient(gradients[0], tiny.flat_gradient(model))
