"""Building an engine in a process of its own, so that a compiler that crashes ends only that.

`python -m gnet_opt.backends._engine_build REQUEST` is that process; `build_apart` starts it. It
answers in JSON lines on stdout: `{"phase": NAME, "steps": N}` where a phase of the build begins,
`{"step": I}` for each of its steps, `{"ended": NAME}`, and at last `{"version": VERSION}` or
`{"error": TEXT}`.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from gnet_opt.backends._boundary import translated
from gnet_opt.backends._build_options import BuildOptions
from gnet_opt.backends._engine import Library, collect_errors, reason
from gnet_opt.errors import BackendError
from gnet_opt.progress import Progress, silent

_ADVICE = "Check the file with `gnet-opt inspect`, or export the model again."
_MIB = 1 << 20


def build_apart(
    library: Library,
    model: Path,
    engine: Path,
    options: BuildOptions,
    *,
    compute_capabilities: Sequence[str] = (),
    precisions: Sequence[str] = (),
    timings: Path | None = None,
    progress: Progress = silent,
) -> str:
    """Build an engine in another process.

    Args:
        library: What builds it.
        model: The ONNX file.
        engine: The file to write.
        options: How to build it.
        compute_capabilities: The GPUs to build for, `8.6` for example; empty leaves it to the
            library.
        precisions: Names of the types that a library without strongly typed networks may choose
            beside float32: `INT8`, `FP16`.
        timings: A file of kernels' timings, read where it is there, and written anew beside the
            engine, under the same name. None uses none.
        progress: Shows the phases of the build, where the library tells of them.

    Returns:
        The version of the library.

    Raises:
        BackendError: The library refused the model, or its process died.
    """
    request = {
        "compute_capabilities": list(compute_capabilities),
        "engine": str(engine),
        "model": str(model),
        "module": library.module,
        "options": options.to_dict(),
        "precisions": list(precisions),
        "timings": str(timings) if timings else None,
        "title": library.title,
    }
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            # The current folder must not decide what is imported (ignored before Python 3.11).
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            encoding="utf-8",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            answer = _follow(_messages(process.stdout), progress)
            code = process.wait()
        finally:
            # Ctrl-C, above all: nobody waits for the engine any more.
            process.kill()
        if answer is None:
            errors.seek(0)
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            words = " | ".join(errors.read().strip().splitlines()[-3:])[-400:]
            raise BackendError(
                f"Compiling {model} with {library.title} failed: its process died ({ended}). Its "
                f"last words: {words or 'none'}. {_ADVICE}"
            )
    if "error" in answer:
        raise BackendError(answer["error"])
    return str(answer["version"])


def _messages(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The messages of a process, up to the line in which it died."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def _follow(messages: Iterator[dict[str, Any]], progress: Progress) -> dict[str, Any] | None:
    """Show the phases of a build and return the last message, or None where it does not come."""
    for message in messages:
        if "phase" not in message:
            return message
        steps = itertools.takewhile(lambda told: "step" in told, messages)
        for _ in progress(steps, message["phase"], message["steps"]):
            pass
    return None


def main(text: str, answers: TextIO) -> None:
    """Build what a request asks for, and tell of it line by line."""
    request = json.loads(text)

    def tell(message: dict[str, Any]) -> bool:
        try:
            answers.write(json.dumps(message) + "\n")
            answers.flush()
        except BrokenPipeError:
            return False  # nobody listens any more
        return True

    try:
        with translated(f"Compiling {request['model']} with {request['title']}", _ADVICE):
            trt = importlib.import_module(request["module"])
            _Build(trt, request, tell).run()
            answer = {"version": str(trt.__version__)}
    except BackendError as error:
        answer = {"error": str(error)}
    tell(answer)


class _Build:
    """One build, in the order of `run`.

    Names are looked up where versions differ: TensorRT 8 has no strongly typed networks and 8.6 no
    progress monitor; 11 has none of the flags for precisions. Numbers of enums differ, too, so no
    number is written here.
    """

    def __init__(
        self, trt: Any, request: dict[str, Any], tell: Callable[[dict[str, Any]], bool]
    ) -> None:
        self._trt = trt
        self._request = request
        self._options = BuildOptions.read(request["options"], request["model"])
        self._tell = tell
        self._log, self._errors = collect_errors(trt)

    def run(self) -> None:
        """Build the engine and write it."""
        trt, options = self._trt, self._options
        builder = trt.Builder(self._log)
        network = builder.create_network(self._network_flags())
        # It must live as long as the network, whose weights are in its memory.
        parser = trt.OnnxParser(network, self._log)
        self._parse(parser)
        config = builder.create_builder_config()
        # By default float layers round to ten bits of mantissa, and float would not be float.
        config.clear_flag(trt.BuilderFlag.TF32)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
        if "STRONGLY_TYPED" not in trt.NetworkDefinitionCreationFlag.__members__:
            for name in self._request["precisions"]:
                config.set_flag(self._member("BuilderFlag", name, "the model"))
        self._set_compatibility(config)
        self._set_profile(builder, network, config)
        if self._request["compute_capabilities"]:
            self._set_compute_capabilities(config)
        # It must live as long as the build.
        monitor = self._monitor()
        if monitor is not None:
            config.progress_monitor = monitor
        cache = self._timing_cache(config)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError(reason(self._errors))
        files = {Path(self._request["engine"]): plan}
        if cache is not None:
            timings = Path(self._request["engine"]).with_name(Path(self._request["timings"]).name)
            files[timings] = config.get_timing_cache().serialize()
        for path, content in files.items():
            try:
                path.write_bytes(content)
            except OSError as error:
                raise BackendError(
                    f"{self._request['title']} built an engine of {self._request['model']}, but "
                    f"it cannot be written ({error}). Make room on the disk, and run the command "
                    "again."
                ) from error

    def _network_flags(self) -> int:
        """Strongly typed: each tensor has the type that the ONNX file gives it.

        From 11 on nothing else is possible. TensorRT 8 does not know it, and wants to be told that
        the batch is a dimension like others.
        """
        flags = self._trt.NetworkDefinitionCreationFlag.__members__
        known = [name for name in ("STRONGLY_TYPED", "EXPLICIT_BATCH") if name in flags]
        return 1 << int(flags[known[0]])

    def _parse(self, parser: Any) -> None:
        if not parser.parse_from_file(self._request["model"]):
            found = [_described(parser.get_error(index)) for index in range(parser.num_errors)]
            raise RuntimeError(reason(found or self._errors))

    def _set_compatibility(self, config: Any) -> None:
        if self._options.version_compatible:
            config.set_flag(
                self._member("BuilderFlag", "VERSION_COMPATIBLE", "options.version_compatible")
            )
        if level := self._options.hardware_compatibility:
            config.hardware_compatibility_level = self._member(
                "HardwareCompatibilityLevel", level.upper(), "options.hardware_compatibility"
            )

    def _member(self, enum: str, name: str, option: str) -> Any:
        """A member of one of the library's enums."""
        members = getattr(self._trt, enum).__members__ if hasattr(self._trt, enum) else {}
        if name not in members:
            raise BackendError(
                f"{self._request['title']} {self._trt.__version__} has no {enum}.{name}, which "
                f"{option} asks for. Update it, or take the option out of the target file and "
                "build the bundle again."
            )
        return members[name]

    def _set_profile(self, builder: Any, network: Any, config: Any) -> None:
        """Say which batches the engine takes, where the model takes any."""
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            batch, *picture = tuple(tensor.shape)
            if -1 in picture:
                raise BackendError(
                    f"{self._request['model']} takes pictures of any size: its input has the "
                    f"shape {tuple(tensor.shape)}. Export it with a fixed height and width."
                )
            if batch != -1:
                continue
            profile = builder.create_optimization_profile()
            profile.set_shape(tensor.name, *((size, *picture) for size in self._options.batches))
            if config.add_optimization_profile(profile) < 0:
                raise RuntimeError(reason(self._errors))

    def _set_compute_capabilities(self, config: Any) -> None:
        """Build for the GPUs that are named; TensorRT-RTX alone can."""
        trt, names = self._trt, self._request["compute_capabilities"]
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            member = f"SM{name.replace('.', '')}"
            known = trt.ComputeCapability.__members__
            if member not in known or not config.set_compute_capability(known[member], index):
                listed = ", ".join(key for key in known if key.startswith("SM"))
                raise BackendError(
                    f"{trt.__name__} {trt.__version__} does not build for compute capability "
                    f"{name}; it knows {listed}. Change options.compute_capabilities of the target."
                )

    def _timing_cache(self, config: Any) -> Any:
        """Give the builder the timings of an earlier build; it refuses those of another machine."""
        if self._request["timings"] is None:
            return None
        path = Path(self._request["timings"])
        for content in ([path.read_bytes()] if path.is_file() else []) + [b""]:
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                # What was said of timings that are refused is no reason why a build fails.
                self._errors.clear()
                return cache
        return None

    def _monitor(self) -> Any:
        """What the library calls to tell of its progress, or None where it does not (8.6).

        It calls from several threads. Phases have phases in them; those in an outermost one are
        told, because the outermost alone takes all the time, and the innermost come by hundreds.
        """
        if not hasattr(self._trt, "IProgressMonitor"):
            return None
        outermost: set[str] = set()
        told: list[str] = []
        lock = threading.Lock()

        def phase_start(_: object, phase_name: str, parent_phase: str | None, steps: int) -> None:
            with lock:
                if parent_phase is None:
                    outermost.add(phase_name)
                elif parent_phase in outermost and not told:
                    told.append(phase_name)
                    self._tell({"phase": phase_name, "steps": steps})

        def step_complete(_: object, phase_name: str, step: int) -> bool:
            with lock:
                # The answer no stops the build.
                return phase_name not in told or self._tell({"step": step})

        def phase_finish(_: object, phase_name: str) -> None:
            with lock:
                if phase_name in told:
                    told.remove(phase_name)
                    self._tell({"ended": phase_name})

        calls = {
            "phase_finish": phase_finish,
            "phase_start": phase_start,
            "step_complete": step_complete,
        }
        return type("Monitor", (self._trt.IProgressMonitor,), calls)()


def _described(error: Any) -> str:
    """A parser's error: which node, what is wrong, and where in the parser's source it says so."""
    said = f"{error.desc()} ({Path(error.file()).name}:{error.line()})"
    if error.node() < 0:  # it is about the whole file, or about a weight, which it names
        return said
    if not hasattr(error, "node_name"):  # TensorRT 8
        return f"node {error.node()}: {said}"
    return f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): {said}"


if __name__ == "__main__":
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A library may print: what it writes to stdout goes to stderr, and answers to the real stdout.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        main(sys.argv[1], stdout)
