"""Where values come from, what they mean, and what is refused, without starting anything."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import assemble, values
from pipeline.config import EngineConfig, HttpConfig, LimitsConfig, ModelConfig, ServerConfig, TimeoutsConfig
from pipeline.errors import StartError
from pipeline.options import OPTIONS, parser
from pipeline.settings import resolve
from pipeline.values import HIDDEN


def refused(arguments: list[str], environment: dict[str, str] | None = None) -> str:
    """The sentence with which these settings are refused, with exit code 2."""
    with pytest.raises(StartError) as caught:
        assemble.check(resolve(arguments, environment or {}))
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message and caught.value.message.endswith((".", "?"))
    return caught.value.message


def test_flags_come_before_the_environment_before_the_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\nmax-num-seqs: 2\nmax_num_queued_reqs: 3\nmodel: from-file\n")
    settings = resolve(["--config", str(file), "--port", "10"], {"QUARTET_PORT": "5", "QUARTET_MAX_NUM_SEQS": "6"})
    assert {key: (settings[key], settings.values[key].source) for key in
            ("port", "max_num_seqs", "max_num_queued_reqs", "block_size", "model")} == {
        "port": (10, "flag"), "max_num_seqs": (6, "QUARTET_MAX_NUM_SEQS"), "max_num_queued_reqs": (3, str(file)),
        "block_size": (16, "default"), "model": ("from-file", str(file))}


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("api-key: [a, b]\noverride-generation-config: {temperature: 0.5}\n"
                                     "enable-prefix-caching: false\nmax-model-len: 32k\nserved-model-name: x\n")
    settings = resolve([], {"QUARTET_CONFIG": str(tmp_path / "c.yaml")})
    assert settings["api_key"] == ("a", "b")
    assert settings["override_generation_config"] == {"temperature": 0.5}
    assert (settings["enable_prefix_caching"], settings["max_model_len"]) == (False, 32000)
    assert settings["served_model_name"] == ("x",)


def test_lists_switches_and_the_model_on_the_command_line() -> None:
    settings = resolve(["--served-model-name", "a", "b", "--api-key", "k1", "--api-key", "k2", "model",
                        "--no-enable-prefix-caching", "--trust-remote-code"], {})
    assert (settings["served_model_name"], settings["api_key"]) == (("a", "b"), ("k1", "k2"))
    assert settings["model"] == "model"
    assert (settings["enable_prefix_caching"], settings["trust_remote_code"]) == (False, True)
    assert resolve([], {"QUARTET_API_KEY": "k1, k2", "QUARTET_TRUST_REMOTE_CODE": "yes"})["api_key"] == ("k1", "k2")


@pytest.mark.parametrize(("text", "number"), [
    ("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("2G", 2 * 2**30), ("2g", 2 * 10**9), ("1.5GiB", 3 * 2**29),
    ("2GB", 2 * 10**9), ("2gB", 2 * 10**9), ("0.5k", 500)])
def test_numbers_with_units(text: str, number: int) -> None:
    assert values.count(text) == number


@given(st.text(max_size=12))
def test_any_other_text_is_no_number(text: str) -> None:
    try:
        assert values.count(text) >= 0
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize(("arguments", "part"), [
    (["--port", "70000"], "--port must be a whole number from 0 to 65535, not '70000'."),
    (["--port", "x"], "not 'x'"),
    (["--prot", "1"], "did you mean --port?"),
    (["--max-modle-len=3"], "did you mean --max-model-len?"),
    (["--xyzzy"], "Unknown option --xyzzy."),
    (["a", "b"], "Unexpected argument 'b'"),
    (["--port"], "expected one argument"),
    (["--api-key", ""], "and not empty"),
    (["--api-key", "my key"], "without spaces"),
    (["--max-model-len", "0"], "or auto"),
    (["--max-model-len", "many"], "or auto"),
    (["--dtype", "int4"], "one of auto, bfloat16"),
    (["--device", "tpu"], "one of auto, cpu, cuda"),
    (["--kv-cache-memory-bytes", "2X"], "from 65536"),
    (["--kv-cache-memory-bytes", "2G", "--num-kv-blocks", "100"], "exclude each other"),
    (["--max-num-batched-tokens", "10"], "at least --max-num-seqs"),
    (["--max-prefill-chunk", "1000"], "must not exceed"),
    (["--override-generation-config", "[1]"], "a JSON object"),
    (["--override-generation-config", '{"temprature": 1}'], "did you mean temperature?"),
    (["--chat-template", "/no/such/file"], "The chat template /no/such/file cannot be read"),
    (["--generation-config", "/no/such"], "auto, vllm or a directory"),
    (["--api-key-file", "/no/such"], "cannot be read"),
    (["--uds", "/tmp/x", "--port", "1"], "one or the other"),
    (["--null-step", "1"], "needs --null-engine"),
    (["--served-model-name", "a", "a"], "twice"),
    (["--frontends", "1000"], "from 1 to 64"),
    (["--config", "/no/such.yaml"], "cannot be read"),
])
def test_what_is_wrong_is_said_in_one_sentence(arguments: list[str], part: str) -> None:
    assert part in refused(arguments)


@pytest.mark.parametrize(("text", "part"), [
    ("prot: 1", "unknown key 'prot'; did you mean port?"),
    ("max_modle_len: 1", "did you mean max-model-len?"),
    ("port: [1, 2]", "a single value"),
    ("port: abc", "port must be a whole number"),
    ("port: true", "must be a whole number"),
    ("max-num-seqs: 1\nmax_num_seqs: 2", "there twice"),
    ("- a", "keys and values"),
    ("a: [", "not valid YAML (line 1)"),
    ("api-key: ''", "not empty"),
    ("!!python/object/apply:os.system ['true']", "not valid YAML"),
])
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    sentence = refused(["--config", str(tmp_path / "c.yaml")])
    assert part in sentence and str(tmp_path / "c.yaml") in sentence


def test_the_environment_is_named_in_its_errors_and_an_empty_key_never_counts_as_none() -> None:
    assert refused([], {"QUARTET_PORT": "x"}).startswith("QUARTET_PORT must be")
    assert refused([], {"QUARTET_API_KEY": ""}).startswith("QUARTET_API_KEY must be")
    assert refused([], {"QUARTET_API_KEY": "a,,b"}).startswith("QUARTET_API_KEY must be")
    assert resolve([], {"QUARTET_PORT": ""})["port"] == 8000


def test_a_variable_that_looks_like_ours_is_not_ignored_in_silence() -> None:
    assert resolve([], {"QUARTET_PROT": "1"}).warnings == (
        "The variable QUARTET_PROT is no option of quartet; did you mean QUARTET_PORT?",)
    kubernetes = {"QUARTET_SERVICE_HOST": "10.0.0.1", "QUARTET_PORT_8000_TCP_ADDR": "10.0.0.1",
                  "QUARTET_PORT": "tcp://10.0.0.1:8000"}
    settings = resolve([], kubernetes)
    assert settings["port"] == 8000 and len(settings.warnings) == 1
    assert "Kubernetes" in settings.warnings[0]


def test_print_config_is_a_configuration_file_with_sources_and_without_secrets(tmp_path: Path) -> None:
    arguments = ["--max-model-len", "32k", "--override-generation-config", '{"top_k": 5}']
    secret = resolve(["--api-key", "sesame", *arguments], {}).show()
    assert "sesame" not in secret and HIDDEN in secret
    text = resolve(arguments, {"QUARTET_HOST": "::1"}).show()
    assert 'host: "::1"  # QUARTET_HOST' in text and "max-model-len: 32000  # flag" in text
    assert len(text.splitlines()) == len(OPTIONS)
    (tmp_path / "c.yaml").write_text(text)
    again = resolve(["--config", str(tmp_path / "c.yaml")], {})
    assert again["max_model_len"] == 32000 and again["override_generation_config"] == {"top_k": 5}
    assemble.check(again)
    (tmp_path / "c.yaml").write_text(secret)
    assert "placeholder" in refused(["--config", str(tmp_path / "c.yaml")])


def test_a_secret_is_not_repeated_in_the_error_about_it() -> None:
    assert "my key" not in refused(["--api-key", "my key"])


def test_a_key_file_needs_a_key_and_may_hold_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nsk-1\nsk-2 \n")
    assert assemble.keys_in(file) == ("sk-1", "sk-2")
    for text, part in (("# none\n", "holds no key"), ("a b\n", "Line 1")):
        file.write_text(text)
        assert part in refused(["--api-key-file", str(file)])


def test_a_chat_template_is_a_file_or_a_text(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert assemble.chat_template(resolve(["--chat-template", str(tmp_path / "t.jinja")], {})) == "{{ messages }}"
    assert assemble.chat_template(resolve(["--chat-template", "{% for m in messages %}{% endfor %}"], {}))
    assert assemble.chat_template(resolve([], {})) is None


def test_the_help_has_groups_and_every_option() -> None:
    text = parser().format_help()
    for title in ("HTTP server:", "Model:", "Engine:", "Processes:", "Limits:", "Logging and files:"):
        assert title in text
    for option in OPTIONS:
        assert option.positional or f"--{option.spelling or option.name}" in text


def test_the_defaults_of_the_options_are_those_of_the_configuration() -> None:
    settings = resolve([], {})
    assert assemble.engine_config(settings) == EngineConfig()
    model = ModelConfig(names=("m",), path="/m")
    made = assemble.server_config(settings, [model], run_dir=Path("/r"), log_dir=Path("/l"), port=8000, started_ns=0)
    fields = ("http", "limits", "timeouts", "frontends", "seed", "log_level")
    plain: dict[str, Any] = {name: getattr(made, name) for name in fields}
    assert plain == {"http": HttpConfig(), "limits": LimitsConfig(), "timeouts": TimeoutsConfig(), "frontends": 1,
                     "seed": None, "log_level": "INFO"}
    assert isinstance(made, ServerConfig)


def test_every_option_reaches_the_configuration_or_the_command_line() -> None:
    """No option may be accepted and lead nowhere: each key is read somewhere in the command line's modules."""
    folder = Path(assemble.__file__).parent
    names = ("assemble", "pooling", "cli", "served", "preparation")
    text = "".join((folder / f"{name}.py").read_text() for name in names)
    unused = [option.key for option in OPTIONS if f'settings["{option.key}"]' not in text]
    assert unused == []


def test_json_values_survive_the_file(tmp_path: Path) -> None:
    given_values = {"temperature": 0.1, "top_k": None}
    (tmp_path / "c.yaml").write_text(json.dumps({"override-generation-config": given_values}))
    assert resolve(["--config", str(tmp_path / "c.yaml")], {})["override_generation_config"] == given_values
