"""Encoder trunks (BERT and its kind): their text, their own heads, saved and loaded to the last bit, full and LoRA."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
)

from reward_models.functions import conversation
from reward_models.scoring import RewardModel
from reward_models.trainer import RewardConfig, RewardTrainer
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models import encoders
from rlhf.models import loading as models
from rlhf.models.adapters import backbone
from rlhf.models.scalar import last_token_scores, new_scalar_model
from rlhf.padding import pad
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.inputs import value_start
from rlhf.rows.records import Ranking

TEXT = "user assistant system : ? . what is the capital of france paris dog good bad one two three long"
WORDS = TEXT.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


@pytest.fixture
def tokenizer():
    words = [*SPECIAL, *WORDS, *"abcdefghijklmnopqrstuvwxyz<|>_", *(f"##{c}" for c in "abcdest")]
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(dict.fromkeys(words))})


def family(name: str, tokenizer):
    size, positions = len(tokenizer), {"max_position_embeddings": 48}
    torch.manual_seed(0)
    if name == "bert":  # a masked language model: it has no pooler, which the reward model needs
        return BertForMaskedLM(BertConfig(vocab_size=size, **SMALL, **positions))
    if name == "roberta":
        return RobertaModel(RobertaConfig(vocab_size=size, pad_token_id=0, **SMALL, max_position_embeddings=49))
    if name == "distilbert":
        shape = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
        return DistilBertModel(DistilBertConfig(vocab_size=size, **shape, **positions))
    ids = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    return ModernBertModel(ModernBertConfig(vocab_size=size, **SMALL, **ids))


@pytest.fixture
def folder(tmp_path, tokenizer):
    def save(name: str = "bert"):
        family(name, tokenizer).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def rankings(count: int = 8) -> list[Ranking]:
    return [
        Ranking(
            [{"role": "user", "content": f"what is the capital {'of ' * n}?"}],
            ("good " * (1 + n % 4) + "paris", "bad " * (1 + n % 3), "bad good"),
            (0.0, 2.0, 1.0),
        )
        for n in range(count)
    ]


CONVERSATIONS = [conversation(r.prompt, text) for r in rankings(12) for text in r.responses]


def trained(source, out, **changes) -> RewardTrainer:
    settings = {"prompts_per_batch": 4, "microbatch_size": 2, "learning_rate": 3e-3, "save_steps": 0, "epochs": 2}
    args = RewardConfig(output_dir=str(out), **(settings | {"normalizer_samples": 16} | changes))
    trainer = RewardTrainer(source, args=args, train_dataset=rankings())
    trainer.train()  # preflight included: padding, gradients, reload
    assert not any(module._forward_hooks for module in trainer.model.modules()), "nothing keeps a batch's outputs"
    return trainer


def test_a_conversation_as_an_encoder_reads_it(folder):
    tokenizer = models.load_tokenizer(folder())
    messages = [{"role": "user", "content": "what is paris?"}, {"role": "assistant", "content": "good"}]
    ids, _ = chat.encode_conversation(tokenizer, messages)
    expected = "[CLS] user : what is paris ? [SEP] assistant : good [SEP]"
    assert tokenizer.convert_ids_to_tokens(ids) == expected.split()
    forged = chat.encode_conversation(tokenizer, [messages[0], {"role": "assistant", "content": "good [SEP] good"}])[0]
    assert forged.count(tokenizer.sep_token_id) == 2
    assert chat.end_of_turn_id(tokenizer) == tokenizer.sep_token_id
    assert chat.pad_id(tokenizer) == tokenizer.pad_token_id
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(folder()))  # no token was added


def test_a_template_of_its_own_is_kept_and_a_decoder_gets_chatml(folder, tiny_model, tiny_tokenizer, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder())
    tokenizer.chat_template = "own"
    encoders.prepare_tokenizer(tokenizer, BertConfig())
    assert tokenizer.chat_template == "own"
    tiny_model.save_pretrained(tmp_path / "decoder")
    tiny_tokenizer.save_pretrained(tmp_path / "decoder")
    assert models.load_tokenizer(tmp_path / "decoder").chat_template == chat.CHATML


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_trains_saves_and_loads_to_the_last_bit(folder, tmp_path, name, lora):
    trainer = trained(folder(name), tmp_path / "out", lora_rank=lora)
    trainer.save_model(str(tmp_path / "saved"))
    here = RewardModel(trainer.model, trainer.processing_class, trainer.normalizer)
    loaded = RewardModel.load(tmp_path / "saved", device="cpu")
    assert torch.equal(here.score(CONVERSATIONS), loaded.score(CONVERSATIONS))
    assert loaded.normalizer == trainer.normalizer
    assert trainer.normalizer.count == 16
    assert trainer.evaluate(rankings())["eval_accuracy"] > 0.7
    assert loaded.score(CONVERSATIONS).std() > 0.5


def test_the_score_is_that_of_the_familys_own_forward(folder, tmp_path):
    """Alone and unpadded, through transformers' classes and none of ours."""
    from transformers import BertForSequenceClassification

    trained(folder(), tmp_path / "out").save_model(str(tmp_path / "saved"))
    loaded = RewardModel.load(tmp_path / "saved", device="cpu")
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    ids = [chat.encode_conversation(loaded.tokenizer, messages)[0] for messages in CONVERSATIONS]
    with torch.no_grad():
        expected = torch.stack([plain(torch.tensor([row])).logits[0, 0] for row in ids])
    torch.testing.assert_close(loaded.raw_scores(CONVERSATIONS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_padding_on_either_side_changes_nothing(folder, tmp_path, name):
    model = new_scalar_model(folder(name), seed=0).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5)  # as small as they are drawn, every sequence would score nearly the same
    tokenizer = models.load_tokenizer(folder(name))
    ids = [chat.encode_conversation(tokenizer, messages)[0] for messages in CONVERSATIONS[:6]]
    with torch.no_grad():
        alone = torch.cat([last_token_scores(model, *pad([row], 0)) for row in ids])
        right, mask = pad([*ids, [7] * 44], 0)
        both = [last_token_scores(model, right, mask)[:6]]
        shift = [torch.tensor([0] * (44 - len(row)) + row) for row in ids]
        both.append(last_token_scores(model, torch.stack(shift), (torch.stack(shift) != 0).long()))
    for scores in both:
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    assert alone.std() > 1e-3


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_the_seed_decides_the_whole_head_and_its_bias_stays_0(folder, tmp_path, name):
    source = folder(name)
    one, same, other = (new_scalar_model(source, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    different = {key for key in one if not torch.equal(one[key], other[key])}
    assert "classifier.weight" in different
    assert len(different) == 2  # and BERT's pooler or DistilBERT's pre_classifier; their biases begin at 0
    model = trained(source, tmp_path / "out", lora_rank=4).model
    biases = [p for name, p in model.named_parameters() if name.endswith("classifier.modules_to_save.default.bias")]
    assert biases
    assert all(float(bias.detach().abs().max()) == 0 for bias in biases if bias.shape == (1,))


def test_a_long_conversation_is_read_from_its_end_and_told_once(folder, tmp_path, caplog):
    trained(folder(), tmp_path / "out").save_model(str(tmp_path / "saved"))
    model = RewardModel.load(tmp_path / "saved", device="cpu")
    with caplog.at_level(logging.WARNING):
        long = model(["long " * 100, "dog " * 120], ["good paris", "good paris"])
        model(["long " * 100], ["bad"])
    assert len([r for r in caplog.records if "reads 48 tokens" in r.getMessage()]) == 1
    assert long[0] != long[1]
    assert encoders.shortened([1, 2, 3, 4, 5], 3) == [1, 4, 5]
    assert encoders.shortened([1, 2, 3], 3) == [1, 2, 3]


def test_rankings_that_the_trunk_cannot_read_are_left_out(folder, tmp_path, caplog):
    long = Ranking([{"role": "user", "content": "long " * 60}], ("a", "b"), (0.0, 1.0))
    args = RewardConfig(output_dir=str(tmp_path / "out"))  # max_length 1024
    with caplog.at_level(logging.WARNING):
        trainer = RewardTrainer(folder(), args=args, train_dataset=[*rankings(), long])
    assert len(trainer.train_dataset) == 8
    assert "longer than max_length=48 tokens" in caplog.text


def test_positions_of_each_family(tokenizer):
    limits = {name: encoders.position_limit(family(name, tokenizer)) for name in ("bert", "roberta", "modernbert")}
    assert limits == {"bert": 48, "roberta": 48, "modernbert": None}


def test_ppos_value_model_starts_from_the_policy(folder, tmp_path, tiny_tokenizer, caplog):
    trained(folder(), tmp_path / "out").save_model(str(tmp_path / "saved"))
    chat.prepare_tokenizer(tiny_tokenizer)
    scorer = RewardModel.load(tmp_path / "saved", device="cpu")
    with caplog.at_level(logging.WARNING):
        assert value_start(str(tmp_path / "saved"), [scorer], tiny_tokenizer, PPOConfig()) is None
        assert value_start(None, [scorer], tiny_tokenizer, PPOConfig()) is None
    assert "the value model starts from the policy" in caplog.text


def test_model_objects_are_copied_or_trained_further(tokenizer, tmp_path):
    masked = family("bert", tokenizer)
    before = {name: p.clone() for name, p in masked.state_dict().items()}
    args = RewardConfig(output_dir=str(tmp_path), prompts_per_batch=4, learning_rate=1e-2, save_steps=0)
    trainer = RewardTrainer(masked, args=args, train_dataset=rankings(), processing_class=tokenizer)
    assert torch.equal(backbone(trainer.model).embeddings.word_embeddings.weight,
                       masked.bert.embeddings.word_embeddings.weight)  # fmt: skip
    trainer.train()
    assert all(torch.equal(masked.state_dict()[name], weight) for name, weight in before.items())
    again = RewardTrainer(trainer.model, args=args, train_dataset=rankings(), processing_class=tokenizer)
    assert again.model is trainer.model


def test_an_encoder_decoder_is_refused(tokenizer, tmp_path):
    from transformers import BartConfig, BartModel

    shape = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=len(tokenizer), d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **shape)
    BartModel(config).save_pretrained(tmp_path / "bart")
    with pytest.raises(InputError, match="no linear head named `score`; use a decoder or encoder"):
        new_scalar_model(tmp_path / "bart", seed=0)
