"""The text predictor: known texts go to their experts, unknown ones fall back."""

import copy
import math
import pickle
import sys
import types

import pytest
import torch
from router_cases import DIM, frame, inputs

from mole.routers import MixtureShape, PredictorConfig, PredictorRouter
from mole.routers.text_encoders import TextClassifier, inverse_frequencies, ngrams, tfidf

TEXTS = {
    "sums": ["add 3 and 4", "what is 12 plus 5", "sum of 1 2 3"],
    "words": ["spell banana", "how do you spell giraffe", "letters of the word tree"],
    "dates": ["which day is the 3rd of may", "days between june and july"],
}
SHAPE = MixtureShape(("calculator", "writer", "both"), (("sums",), ("words", "dates"), ("dates",)), ("x",), DIM)


def built(config=None, texts=None, shape=SHAPE, **options) -> PredictorRouter:
    router = PredictorRouter(config or PredictorConfig(**options), shape).eval()
    texts = TEXTS if texts is None else texts
    router.learn_frequencies([text for own in texts.values() for text in own])
    router.take_examples({task: router.embedded(own) for task, own in texts.items()})
    return router


def with_vectors(vectors, labels, **options) -> PredictorRouter:
    """A router that compares with these embeddings of its tasks 0, 1, 2."""
    router = PredictorRouter(PredictorConfig(**options), SHAPE).eval()
    router.examples, router.labels = torch.nn.functional.normalize(vectors, dim=-1), torch.tensor(labels)
    return router


def chosen(router, *texts):
    routing = router(None, frame(texts=texts))
    return routing.dense(3)[:, 0].argmax(-1).tolist()


# ---- texts as vectors
def test_vectors_have_length_1_and_those_of_empty_texts_are_0():
    vectors = tfidf(["some text", "", "  "], torch.ones(64))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.tensor([1.0, 0.0, 0.0]))


def test_tfidf_is_the_formula_by_hand():
    texts = ["ab ab", "abc"]
    frequencies = inverse_frequencies(texts, 256)
    buckets = ngrams("ab ab", 256)
    assert sum(buckets.values()) == 2 * (2 + 1 + 1)  # " ab ": 2 of 3 letters, 1 of 4, one of what is shorter than 5
    for bucket, count in buckets.items():
        together = sum(bucket in ngrams(text, 256) for text in texts)
        assert float(frequencies[bucket]) == pytest.approx(math.log(3 / (1 + together)) + 1)
        row = tfidf(["ab ab"], frequencies)[0]
        norm = math.sqrt(sum(((1 + math.log(n)) * float(frequencies[b])) ** 2 for b, n in ngrams("ab ab", 256).items()))
        assert float(row[bucket]) == pytest.approx((1 + math.log(count)) * float(frequencies[bucket]) / norm, rel=1e-5)


# ---- heads
@pytest.mark.parametrize("head", ["centroid", "nearest", "knn"])
def test_texts_like_an_expert_s_own_go_to_it(head):
    router = built(head=head, neighbours=1)
    assert chosen(router, "add 7 and 9", "spell the word giraffe") == [0, 1]


def test_centroid_scores_are_cosines_with_the_mean():
    router = built(top_k=None, temperature=0.2)
    vectors = router.embedded(["add the days of may"])
    means = [router.embedded(own).mean(0) for own in TEXTS.values()]
    cosines = torch.stack([torch.nn.functional.cosine_similarity(vectors[0], mean, dim=0) for mean in means])
    p = torch.softmax(cosines / 0.2, 0)
    want = torch.stack([p[0], p[1] + p[2], p[2]])  # an expert of two tasks has the probability of both
    routing = router(None, frame(texts=["add the days of may"]))
    torch.testing.assert_close(routing.weights[0, 0], want / want.sum())


def test_nearest_scores_by_the_best_example_and_knn_by_votes():
    vectors = torch.tensor([[1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]])
    text = torch.tensor([[1.0, 0.0]])
    router = with_vectors(vectors, [0, 1, 1, 1], head="nearest", top_k=None)
    cosines = torch.nn.functional.normalize(vectors, dim=-1)[:, 0]
    assert torch.equal(router._likeness(text)[0, :2], torch.stack([cosines[0], cosines[1:].max()]))
    router = with_vectors(vectors, [0, 1, 1, 1], head="knn", neighbours=4, top_k=None, temperature=1.0)
    p = torch.softmax(router.expert_scores(text), -1)[0]
    torch.testing.assert_close(p[:2], torch.tensor([0.25, 0.75]))
    assert p[2] == 0


def test_a_classifier_is_what_it_was_trained_to_be():
    router = built(head="classifier")
    torch.manual_seed(0)
    classifier = TextClassifier(2048, 8, 3)
    router.take_classifier(classifier.layers())
    vectors = router.embedded(["add 7 and 9"])
    torch.testing.assert_close(
        router._likeness(vectors), torch.log_softmax(classifier(vectors).logits[:, 0], -1).detach()
    )


def test_a_classifier_of_other_tasks_is_missing_all_of_them():
    router = built(head="classifier")
    assert router.missing() == router.tasks


def test_at_most_k_experts_share_the_work():
    router = built(top_k=2)
    routing = router(None, frame(texts=["spell june", "add 3"]))
    assert routing.weights.shape == (2, 1, 2)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(2, 1))


def test_embeddings_of_the_prompt_alone_are_averaged():
    embeddings = inputs(2, 4, DIM)
    prompt = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    router = with_vectors(torch.eye(DIM)[:3], [0, 1, 2], encoder="backbone", top_k=None)
    found = router._read(frame(embeddings=embeddings, prompt_mask=prompt))
    want = torch.stack([embeddings[0, :2].mean(0), embeddings[1, 2:].mean(0)])
    torch.testing.assert_close(found, torch.nn.functional.normalize(want, dim=-1))
    assert router.needs == {"embeddings", "prototypes"}


def test_sentences_are_read_by_a_model_that_is_loaded_once_and_never_copied(monkeypatch):
    loaded = []

    class Stub:
        def __init__(self, name):
            loaded.append(name)

        def encode(self, texts):
            return [[float(len(text)), 1.0] for text in texts]

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Stub))
    router = built(encoder="sentence", sentence_model="some/model")
    assert chosen(router, "add 3 and 4") == [0] or loaded
    assert loaded == ["some/model"]
    twins = copy.deepcopy(router), pickle.loads(pickle.dumps(router))
    assert all(chosen(twin, "add 3 and 4") == chosen(router, "add 3 and 4") for twin in twins)
    assert len(loaded) == 3
    torch.testing.assert_close(router.embedded(["abc"])[0], torch.tensor([3.0, 1.0]) / math.sqrt(10))


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"mole-experts\[sentence\]"):
        built(encoder="sentence")


# ---- abstaining
@pytest.mark.parametrize(
    ("fallback", "want"), [("uniform", [1 / 3] * 3), ("backbone", [0.0] * 3), ("default", [0.0, 1.0, 0.0])]
)
def test_texts_like_none_fall_back(fallback, want):
    default = "writer" if fallback == "default" else None
    router = built(min_confidence=0.7, fallback=fallback, default_expert=default)
    routing = router(None, frame(texts=["zzz qqq", "add 3 and 4", ""]))
    dense = routing.dense(3)[:, 0]
    torch.testing.assert_close(dense[0], torch.tensor(want))
    torch.testing.assert_close(dense[1], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(dense[2], torch.tensor(want))


def test_an_empty_text_falls_back_without_any_threshold():
    routing = built()(None, frame(texts=["", "add 3 and 4"]))
    torch.testing.assert_close(routing.dense(3)[0, 0], torch.full((3,), 1 / 3))


# ---- what it knows
def test_tasks_without_texts_are_never_chosen():
    router = built(texts={"sums": TEXTS["sums"]}, top_k=None)
    assert router.missing() == ("words", "dates")
    routing = router(None, frame(texts=["spell banana"]))
    assert routing.weights[0, 0].tolist() == [1.0, 0.0, 0.0]


def test_tasks_that_stay_are_carried_to_other_experts():
    old = built(head="nearest")
    shape = MixtureShape(("new", "speller"), (("stars",), ("words",)), ("x",), DIM)
    new = PredictorRouter(PredictorConfig(head="nearest"), shape)
    new.carry(old)
    assert new.missing() == ("stars",)
    vectors = old.embedded(["spell kiwi"])
    torch.testing.assert_close(new._likeness(vectors)[0, 1], old._likeness(vectors)[0, 1])
    assert torch.equal(new.frequencies, old.frequencies)


def test_a_mixture_without_tasks_is_refused():
    with pytest.raises(ValueError, match="no expert of this mixture lists a task"):
        PredictorRouter(PredictorConfig(), MixtureShape(("a",), ((),), ("x",), DIM))


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="default_expert go together"):
        PredictorConfig(fallback="default")
    with pytest.raises(ValueError, match="did you mean writer"):
        PredictorRouter(PredictorConfig(fallback="default", default_expert="writr"), SHAPE)


@pytest.mark.parametrize("change", [{"labels": torch.tensor([0, 9, 1])}, {"frequencies": torch.ones(7)}])
def test_a_state_of_other_tasks_is_refused(change):
    router = built()
    for name, value in change.items():
        setattr(router, name, value)
    with pytest.raises(ValueError, match="does not fit"):
        router.check_state()
