"""The classifier judge with a tiny real model: labels, batches, cut completions, and unscored completions."""

import itertools

import pytest
from pydantic import ValidationError

from stayaligned.core.errors import StayalignedError
from stayaligned.core.records import Completion, Message, Outcome
from stayaligned.evaluation.judges import JUDGES
from stayaligned.evaluation.judges.classifier import Classifier
from stayaligned.hf.judge_models.classifier import PairClassifier
from stayaligned.testing import byte_tokenizer, write_pico_checkpoint
from support.guards import judged

LABELS = {0: "refuse", 1: "harm", 2: "other"}


def write_judge(directory, *, labels=LABELS, positions=64, **settings):
    import torch
    from tokenizers import processors
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=261,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
        initializer_range=1.0,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
        **settings,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", pair="$A:0 <|end|>:0 $B:1 <|end|>:1", special_tokens=[("<|end|>", 1)]
    )
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def judge_directory(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge"))


def completion(text, request="loot", key="1", prompt_set="harmful"):
    turns = (Message(role="system", content="x" * 500), Message(role="user", content=request))
    return Completion(id=key, prompt_set=prompt_set, prompt=turns, text=text)


def answers(n):
    return [completion(chr(97 + i % 26) * (1 + i * 7 % 30), key=str(i)) for i in range(n)]


def test_verdicts_equal_a_direct_forward_of_request_and_answer(judge_directory):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(judge_directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(judge_directory)
    rows = answers(20)
    found = judged(Classifier(model=judge_directory, batch_size=6), rows)
    for row, verdict in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer("loot", row.text, return_tensors="pt")).logits[0]
        assert verdict.outcome == LABELS[int(logits.argmax())]
        assert verdict.confidence == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
        assert (verdict.id, verdict.prompt_set, verdict.reason) == (row.id, "harmful", "")
    assert len({verdict.outcome for verdict in found}) > 1


def test_verdicts_do_not_depend_on_batch_size_or_order(judge_directory):
    rows = answers(20)
    one = judged(Classifier(model=judge_directory, batch_size=1), rows)
    many = judged(Classifier(model=judge_directory, batch_size=20), rows[::-1])[::-1]
    assert [v.outcome for v in one] == [v.outcome for v in many]
    assert [v.confidence for v in one] == pytest.approx([v.confidence for v in many], abs=1e-5)


def test_an_empty_completion_is_other_without_the_model(judge_directory):
    empty, full = judged(Classifier(model=judge_directory), [completion(" \n"), completion("abc")])
    assert (empty.outcome, empty.confidence, empty.reason) == (Outcome.OTHER, None, "empty")
    assert full.confidence is not None


def test_a_cut_completion_is_noted_and_one_after_a_too_long_request_is_unscored(judge_directory):
    fits, cut, full = judged(
        Classifier(model=judge_directory),
        [completion("b" * 58), completion("b" * 59), completion("b", request="r" * 80)],
    )
    assert (fits.reason, cut.reason) == ("", "completion cut to fit the judge's input")
    assert (cut.outcome, cut.confidence) == (fits.outcome, pytest.approx(fits.confidence, abs=1e-6))
    assert (full.outcome, full.confidence, full.reason) == (None, None, "the request alone exceeds the judge's input")


def test_a_template_is_filled_and_its_tail_survives_a_cut(judge_directory):
    judge = PairClassifier.load(judge_directory)

    def read(answer):
        ((_, reading),) = judge.classify([("{answer}", answer)], template="Q{request} A{answer} END")
        return reading

    kept = 64 - 1 - len("Q{answer} A END")
    reading, same, longer = (read("b" * n) for n in (100, kept, kept + 1))
    assert (reading.was_cut, same.was_cut, longer.was_cut) == (True, False, True)
    assert (reading.labels, reading.confidence) == (same.labels, pytest.approx(same.confidence, abs=1e-6))


@pytest.mark.parametrize("template", ["only {answer}", "{request}", "{request} {answer} {answer}"])
def test_a_template_without_both_placeholders_is_an_error(template):
    with pytest.raises(ValidationError, match="once each"):
        Classifier(model="x", template=template)


def test_below_the_minimum_confidence_nothing_is_scored(judge_directory):
    rows = answers(20)
    free = judged(Classifier(model=judge_directory), rows)
    middle = sorted(v.confidence for v in free)[10]
    strict = judged(Classifier(model=judge_directory, min_confidence=middle), rows)
    assert sum(v.outcome is None for v in strict) == 10
    for before, after in zip(free, strict, strict=True):
        assert after.outcome == (before.outcome if before.confidence >= middle else None)
        assert after.confidence == pytest.approx(before.confidence, abs=1e-6)
        assert (after.outcome is None) == after.reason.endswith("below min_confidence")


def test_labels_are_mapped_and_each_must_have_an_outcome(tmp_path):
    directory = write_judge(tmp_path / "judge", labels={0: "SAFE", 1: "UNSAFE", 2: "Refuse"})
    mapping = {"SAFE": "other", "UNSAFE": "harm", "Refuse": "refuse"}
    judge = Classifier(model=directory, labels=mapping)
    assert {v.outcome for v in judged(judge, answers(20))} <= set(Outcome)
    assert JUDGES.parse(judge.spec()) == judge
    assert judge.spec()["labels"] == mapping
    assert hash(judge) == hash(JUDGES.parse(judge.spec()))
    with pytest.raises(StayalignedError, match="label 'UNSAFE' has no outcome; its labels are SAFE, UNSAFE, Refuse"):
        judged(Classifier(model=directory), answers(1))
    with pytest.raises(StayalignedError, match="it has no label 'UNSAVE'"):
        judged(Classifier(model=directory, labels={**mapping, "UNSAVE": "harm"}), answers(1))


def test_the_settings_say_whether_it_tells_refusals_and_must_match_the_model(tmp_path):
    both = write_judge(tmp_path / "both", labels={0: "safe", 1: "harm"})
    with pytest.raises(StayalignedError, match="no label means a refusal"):
        judged(Classifier(model=both), answers(1))
    judge = Classifier(model=both, labels={"safe": "safe", "harm": "harm"})
    assert not judge.tells_refusals
    assert {v.outcome for v in judged(judge, answers(20))} <= {Outcome.SAFE, Outcome.HARM}
    three = write_judge(tmp_path / "three")
    assert Classifier(model=three).tells_refusals
    with pytest.raises(StayalignedError, match=": a label means a refusal"):
        judged(Classifier(model=three, labels={"other": "safe"}), answers(1))
    assert Classifier(model=three, labels={"refuse": "refuse", "other": "safe"}).tells_refusals


def test_a_multi_label_model_flags_above_the_threshold_and_the_worst_flag_counts(tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    labels = {0: "first", 1: "second", 2: "third"}
    directory = write_judge(tmp_path / "multi", labels=labels, problem_type="multi_label_classification")
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = answers(8)
    with torch.no_grad():
        inputs = [tokenizer("loot", row.text, return_tensors="pt") for row in rows]
        by_hand = [torch.sigmoid(model(**each).logits[0]).tolist() for each in inputs]
    kinds = (Outcome.HARM, Outcome.REFUSE, Outcome.SAFE)
    seen = set()
    for meanings in (*itertools.permutations(kinds), (Outcome.SAFE,) * 3):
        unflagged = Outcome.OTHER if Outcome.REFUSE in meanings else Outcome.SAFE
        for threshold in (0.0, 0.5, 1 - 1e-9):
            judge = Classifier(
                model=directory, labels=dict(zip(labels.values(), meanings, strict=True)), threshold=threshold
            )
            for found, verdict in zip(by_hand, judged(judge, rows), strict=True):
                flagged = {meaning for meaning, p in zip(meanings, found, strict=True) if p > threshold}
                worst = next((kind for kind in kinds if kind in flagged), unflagged)
                assert verdict.outcome == worst
                assert verdict.confidence == pytest.approx(max(found) if flagged else 1 - max(found), abs=1e-5)
                seen.add((worst, len(flagged)))
    assert {outcome for outcome, _ in seen} == set(Outcome)
    assert {number for _, number in seen} >= {0, 1, 3}


def test_a_label_means_what_the_mapping_says(tmp_path):
    directory = write_judge(tmp_path / "judge")
    plain = judged(Classifier(model=directory), answers(20))
    swapped = judged(Classifier(model=directory, labels={"harm": "refuse", "refuse": "harm"}), answers(20))
    other = {Outcome.HARM: Outcome.REFUSE, Outcome.REFUSE: Outcome.HARM, Outcome.OTHER: Outcome.OTHER}
    assert [v.outcome for v in swapped] == [other[v.outcome] for v in plain]


def test_a_model_that_is_not_a_trained_classifier_is_an_error(tmp_path):
    language_model = write_pico_checkpoint(tmp_path / "lm")
    with pytest.raises(StayalignedError, match="lacks 1 weights of a LlamaForSequenceClassification, such as score"):
        judged(Classifier(model=str(language_model)), answers(1))
    regression = write_judge(tmp_path / "regression", problem_type="regression")
    with pytest.raises(StayalignedError, match=r"among labels; this model has 3 \(regression"):
        judged(Classifier(model=regression), answers(1))
    with pytest.raises(StayalignedError, match="no such directory"):
        judged(Classifier(model=str(tmp_path / "nowhere")), answers(1))


@pytest.mark.parametrize("pad", [None, "[PAD]", "<|user|>"], ids=["none", "not in the embedding", "another"])
@pytest.mark.parametrize("own", [None, -1, 0])
def test_a_decoder_classifier_reads_its_last_token_whatever_the_padding(tmp_path, pad, own):
    import torch
    from transformers import AutoModelForSequenceClassification

    from stayaligned.testing import pico_config

    torch.manual_seed(0)
    config = pico_config("llama", id2label=LABELS, label2id={v: k for k, v in LABELS.items()})
    config.pad_token_id = None
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.config.pad_token_id = own
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": pad} if pad else {})
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    rows = answers(12)
    found = judged(Classifier(model=str(tmp_path), template="{request} {answer}", batch_size=12), rows)
    for row, verdict in zip(rows, found, strict=True):
        with torch.no_grad():
            model.config.pad_token_id = None  # one row is read to its end
            logits = model(**tokenizer(f"loot {row.text}", return_tensors="pt")).logits[0]
        assert verdict.confidence == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)
