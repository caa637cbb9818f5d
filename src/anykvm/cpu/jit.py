"""From LLVM IR to callable code, with a cache of object files on disk.

One `Jit` serves the whole process (LLVM's calls are serialised anyway, and engines must not be torn
down in any order). Code comes in batches: a batch is one LLVM module, one object file, one file of
the cache. A cache file's name tells what is in it, its content is checked against a digest, and it
belongs to one engine version: the sources of this package, LLVM and the host processor. So a
truncated or foreign file costs a compilation and nothing else, and processes can share a folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from anykvm.cpu.ir import Function, Module

MAGIC = b"anykvm object 1\n"
KEEP_SECONDS = 30 * 86400
log = logging.getLogger("anykvm.cpu.jit")


def cache_root() -> Path:
    """Where translations are kept: `ANYKVM_CACHE`, else the user's cache directory."""
    own = os.environ.get("ANYKVM_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "anykvm"


def engine_version(cpu: str, features: str) -> str:
    """A digest of everything that compiled code depends on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for text in (llvmlite.__version__, ".".join(map(str, llvm.llvm_version_info)), cpu, features):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:20]


class ObjectCache:
    """Object files on disk, by the names of the functions in them."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._where: dict[str, Path] = {}
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(folder.glob("*.batch"))
        except OSError as error:
            log.warning("no translation cache in %s: %s", folder, error)
            self.folder = None
            return
        for path in files:
            for name in self._names(path):
                self._where.setdefault(name, path)

    def _names(self, path: Path) -> list[str]:
        content = self._read(path)
        return content[0] if content else []

    def _read(self, path: Path) -> tuple[list[str], bytes] | None:
        """Names and object code of a cache file; a damaged one is removed."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        head, _, rest = data.removeprefix(MAGIC).partition(b"\n")
        line, _, code = rest.partition(b"\n")
        try:
            if not data.startswith(MAGIC) or hashlib.sha256(rest).hexdigest().encode() != head:
                raise ValueError(f"expected the digest of its content, got {head[:64]!r}")
            return list(map(str, json.loads(line))), code
        except ValueError as problem:
            log.warning(
                "translation cache: %s is damaged (%s), translating anew", path.name, problem
            )
            with contextlib.suppress(OSError):  # a folder that cannot be written to
                path.unlink(missing_ok=True)
            return None

    def find(self, name: str) -> tuple[list[str], bytes] | None:
        """The batch that has function `name`."""
        path = self._where.get(name)
        return self._read(path) if path else None

    def keep(self, names: Sequence[str], code: bytes) -> None:
        if self.folder is None:
            return
        rest = json.dumps(list(names)).encode() + b"\n" + code
        digest = hashlib.sha256(rest).hexdigest()
        path = self.folder / f"{digest[:24]}.batch"
        if not replace_file(path, MAGIC + digest.encode() + b"\n" + rest):
            self.folder = None


def replace_file(path: Path, data: bytes) -> bool:
    """Writes a file of the cache so that others see all of it or nothing; False if it cannot be."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("translation cache: cannot write %s: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True


def forget_old_versions(folder: Path) -> None:
    """Removes the caches of other engine versions that nothing has used for some weeks."""
    with contextlib.suppress(OSError):
        for old in folder.parent.iterdir():
            if old != folder and time.time() - old.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(old, ignore_errors=True)


class Jit:
    """Compiles functions and gives their addresses. Thread-safe."""

    def __init__(self, folder: Path | None) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.initialize_native_asmparser()  # for inline assembly
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        self._machine = llvm.Target.from_default_triple().create_target_machine(
            opt=2, cpu=cpu, features=features, codemodel="jitdefault", jit=True
        )
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._machine)
        version = engine_version(cpu, features)
        self.cache = ObjectCache(folder / "code" / version if folder else None)
        if self.cache.folder:
            forget_old_versions(self.cache.folder)
        self.lock = threading.RLock()
        self._addresses: dict[str, int] = {}
        self.seconds = 0.0  # spent in LLVM
        self.compiled = 0  # functions compiled in this process
        self.loaded = 0  # functions taken from the cache

    def addresses(
        self, names: Iterable[str], make: Callable[[list[str]], Iterable[Function]]
    ) -> list[int]:
        """Addresses of functions; `make` gives the IR of those that are neither loaded nor cached,
        as one batch.
        """
        with self.lock:
            names = list(names)
            for name in names:
                if name not in self._addresses and (batch := self.cache.find(name)):
                    self._load(*batch)
                    self.loaded += len(batch[0])
            missing = [n for n in dict.fromkeys(names) if n not in self._addresses]
            if missing:
                self._compile(missing, make(missing))
            return [self._addresses[n] for n in names]

    def _compile(self, names: list[str], functions: Iterable[Function]) -> None:
        start = time.perf_counter()
        module = Module()
        for function in functions:
            module.add(function)
        code = self.compile_ir(module.render())
        self.cache.keep(names, code)
        self._load(names, code)
        self.compiled += len(names)
        self.seconds += time.perf_counter() - start

    def compile_ir(self, text: str) -> bytes:
        """Object code of a module of LLVM IR.

        Four passes do for this code what the whole pipeline of -O2 does, in a quarter of the time.
        """
        module = llvm.parse_assembly(text)
        module.verify()
        builder = llvm.create_pass_builder(self._machine, llvm.create_pipeline_tuning_options())
        passes = llvm.create_new_function_pass_manager()
        passes.add_sroa_pass()
        passes.add_simplify_cfg_pass()
        passes.add_instruction_combine_pass()
        passes.add_simplify_cfg_pass()
        for function in module.functions:
            if not function.is_declaration:
                passes.run(function, builder)
        return bytes(self._machine.emit_object(module))

    def _load(self, names: list[str], code: bytes) -> None:
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        for name in names:
            self._addresses[name] = self._engine.get_function_address(name)


_jit: Jit | None = None
_guard = threading.Lock()


def process_jit() -> Jit:
    """The process's one Jit."""
    global _jit
    with _guard:
        if _jit is None:
            _jit = Jit(cache_root())
        return _jit


def callable_at(
    address: int, result: type | None, *params: type, releases_gil: bool = False
) -> Callable[..., int]:
    """A compiled function with the C calling convention; a short one keeps the GIL."""
    prototype = ctypes.CFUNCTYPE if releases_gil else ctypes.PYFUNCTYPE
    return prototype(result, *params)(address)
