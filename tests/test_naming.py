"""Names of latents: what a judge says, how it is scored, and judges that fail."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_sae_understand import TEXTS, named_sae
from test_sae_understand import model as latent_model  # noqa: F401
from tiny import sentences

from interp_rlhf.cli import main
from interp_rlhf.sae.files import save_sae
from interp_rlhf.validation.inspecting import inspect_latents
from interp_rlhf.validation.judges import CountedJudge, EndpointJudge, FunctionJudge, LocalJudge

# Every third text says " warm" or " rain", which are latents 0 and 2 of the autoencoder.
MANY = [
    f"you {line}{(' warm day', ' rain day', ' sun')[i % 3]}"
    for i, line in enumerate(sentences(60, seed=9, low=2, high=4))
]
MANY = [text.replace("cold", "sun") for text in MANY]


def knows(prompt):
    """A judge that names the word in brackets and looks it up in the text."""
    if prompt.startswith("Does the text contain"):
        name = prompt.split(": ")[1].split("?")[0]
        return "yes" if name in prompt.split("Text: ")[1] else "no"
    return prompt.split("Present:")[1].split("[[")[1].split("]]")[0].strip()


def inspected(model, tokenizer, judge, **more):
    return inspect_latents(
        model, tokenizer, named_sae(model, tokenizer), MANY, latents=[0, 2], contexts=20, judge=judge, **more
    )


def test_a_right_name_detects_its_latent_and_that_of_another_does_not(latent_model, tokenizer):  # noqa: F811
    found = inspected(latent_model, tokenizer, FunctionJudge(knows, "rule"))
    names = [page.name for page in found.pages]
    assert [name.name for name in names] == ["warm", "rain"]
    assert [name.score for name in names] == [1, 1]
    assert all(name.other < 0.7 for name in names)
    assert names[0].judge == "rule"
    assert names[0].windows >= 10
    assert "detects 1.00" in found.event()["latents"][0]["label"]
    assert found.event()["latents"][0]["name"]["other"] == names[0].other


def test_a_judge_that_always_says_yes_has_the_score_of_chance(latent_model, tokenizer):  # noqa: F811
    def yes(prompt):
        return "yes" if prompt.startswith("Does") else "anything"

    found = inspected(latent_model, tokenizer, FunctionJudge(yes))
    assert [page.name.score for page in found.pages] == [0.5, 0.5]


def test_a_latent_without_windows_gets_no_name(latent_model, tokenizer):  # noqa: F811
    found = inspect_latents(
        latent_model, tokenizer, named_sae(latent_model, tokenizer), TEXTS, latents=[3], judge=FunctionJudge(knows)
    )
    assert found.pages[0].name is None
    assert found.event()["latents"][0]["label"] is None


def test_a_judge_that_fails_too_often_stops_everything(latent_model, tokenizer):  # noqa: F811
    calls = []

    def sometimes(prompt):
        calls.append(prompt)
        return None if len(calls) % 4 == 0 else knows(prompt)

    with pytest.raises(RuntimeError, match=r"failed in \d+ of \d+ calls – expected at most 10%"):
        inspected(latent_model, tokenizer, FunctionJudge(sometimes))


def test_abstentions_are_counted_and_not_guessed():
    judge = CountedJudge(FunctionJudge(lambda prompt: "perhaps"))
    assert judge.choose("?", ("yes", "no")) is None
    assert (judge.calls, judge.failed) == (1, 1)
    with pytest.raises(RuntimeError, match="1 of 1"):
        judge.require_reliable()


def test_a_local_model_compares_options_by_their_log_probs(load, tokenizer):
    import torch

    model = load()
    judge = LocalJudge(model, tokenizer, "tiny")
    chances = judge.choose("is it warm", ("yes", "no"))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "is it warm"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    scores = []
    for option in ("yes", "no"):
        after = tokenizer(text=option, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids + after])).logits[0].log_softmax(-1)
        scores.append(sum(float(log_probs[len(ids) - 1 + i, token]) for i, token in enumerate(after)))
    expected = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    assert list(chances.values()) == pytest.approx(expected, abs=1e-5)
    assert sum(chances.values()) == pytest.approx(1)
    assert judge.write("name a word") is None or isinstance(judge.write("name a word"), str)


@contextmanager
def serving(answer):
    """An endpoint of chat completions on loopback; `answer` gets the request and returns a status and a content."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), asked))
            status, content = answer(asked, len(seen))
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()


def test_an_endpoint_is_asked_for_a_strict_schema_and_the_key_stays_in_the_header(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda asked, n: (200, json.dumps({"answer": "no"}))) as (url, seen):
        judge = EndpointJudge(url, "some-model")
        assert judge.choose("Is it?", ("yes", "no")) == {"yes": 0.0, "no": 1.0}
    path, key, asked = seen[0]
    assert path == "/v1/chat/completions"
    assert key == "Bearer secret"
    form = asked["response_format"]["json_schema"]
    assert form["strict"]
    assert form["schema"]["properties"]["answer"]["enum"] == ["yes", "no"]
    assert "secret" not in judge.identity
    assert judge.identity == f"some-model at {url}"


def test_what_fails_is_tried_again_and_then_abstains():
    def second_time(asked, n):
        return (503, "") if n == 1 else (200, json.dumps({"answer": "warm words."}))

    with serving(second_time) as (url, seen):
        assert EndpointJudge(url, "m", wait=0.01).write("Name it") == "warm words"
        assert len(seen) == 2
    with serving(lambda asked, n: (200, "yes, I think so")) as (url, seen):
        assert EndpointJudge(url, "m", wait=0.01, retries=2).choose("Is it?", ("yes", "no")) is None
        assert len(seen) == 3
    assert EndpointJudge("http://127.0.0.1:9/v1", "m", wait=0.01, retries=1).write("Name it") is None


def test_a_judge_can_be_the_measure_of_a_causal_check():
    from interp_rlhf.validation.judges import asked

    measure = asked(
        FunctionJudge(lambda prompt: "yes" if "warm" in prompt.split("Text: ")[1] else "no"), "Is it warm?"
    )
    assert [measure(text) for text in ("a warm day", "a cold day")] == [1, 0]
    assert asked(FunctionJudge(lambda prompt: None), "Is it warm?")("a day") is None


def test_a_request_that_the_endpoint_refuses_is_one_clear_error():
    with (
        serving(lambda asked, n: (401, "")) as (url, _),
        pytest.raises(RuntimeError, match="refuses the request with 401"),
    ):
        EndpointJudge(url, "m").write("Name it")


def test_sae_inspect_names_latents_by_an_endpoint_that_runs_a_model(
    latent_model,  # noqa: F811
    tokenizer,
    tmp_path,
    capsys,
):
    local = LocalJudge(latent_model, tokenizer, "tiny")

    def answer(asked, n):
        """A real tiny model behind the interface."""
        prompt = asked["messages"][0]["content"]
        options = asked["response_format"]["json_schema"]["schema"]["properties"]["answer"].get("enum")
        if options is None:
            return 200, json.dumps({"answer": local.write(prompt) or "a word"})
        chances = local.choose(prompt, options)
        return 200, json.dumps({"answer": max(chances, key=chances.get)})

    latent_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_sae(named_sae(latent_model, tokenizer), tmp_path / "sae")
    (tmp_path / "texts.txt").write_text("\n".join(MANY))
    with serving(answer) as (url, seen):
        words = [
            "sae", "inspect", tmp_path / "sae", "--texts", tmp_path / "texts.txt", "--latents", "0,2", "--contexts", 12,
            "--model", tmp_path / "model", "--judge", url, "--judge-model", "tiny", "--out", tmp_path / "page.html",
        ]  # fmt: skip
        assert main([str(word) for word in words]) == 0
    assert len(seen) > 10
    assert "detects 0." in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "detects 0." in page
    assert f"tiny at {url}" in next(tmp_path.glob("*.jsonl")).read_text()


def test_an_endpoint_without_a_model_name_is_refused(tmp_path, capsys, model_folder, tokenizer, latent_model):  # noqa: F811
    latent_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    save_sae(named_sae(latent_model, tokenizer), tmp_path / "sae")
    (tmp_path / "texts.txt").write_text("a b c")
    words = [
        "sae",
        "inspect",
        tmp_path / "sae",
        "--texts",
        tmp_path / "texts.txt",
        "--latents",
        "0",
        "--judge",
        "http://x",
    ]
    assert main([*map(str, words), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "p.html")]) == 2
    assert "--judge-model" in capsys.readouterr().err
