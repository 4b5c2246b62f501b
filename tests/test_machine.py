"""The record of a machine: read from what each system shows, never a reason to fail, compared when a run goes on."""

import gc
import json
import platform
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from sparlow import machine as found_on
from sparlow.machine import (
    described,
    differences,
    from_cpuinfo,
    from_sysctl,
    garbage_waits,
    give_back,
    machine,
)

INTEL_AMX = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse4_2 avx f16c fma avx2 avx512f avx512dq avx_vnni avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8
bugs\t\t: spectre_v1 spectre_v2

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse4_2 avx f16c fma avx2 avx512f avx512dq avx_vnni avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8
bugs\t\t: spectre_v1 spectre_v2
"""
AMD_AVX2 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7B13
flags\t\t: fpu sse4_2 avx f16c fma bmi1 avx2 smep bmi2 vaes vpclmulqdq rdpid
"""
ARM_SERVER = """\
processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp sve i8mm bf16 dgh
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd40
"""
ARM_BOARD = """\
processor\t: 0
Features\t: fp asimd evtstrm crc32
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 1
Features\t: fp asimd evtstrm crc32 asimddp
CPU implementer\t: 0x51
CPU part\t: 0x800

Model\t\t: A board with large and small cores
"""
APPLE = """\
machdep.cpu.brand_string: Apple M2
machdep.cpu.core_count: 8
hw.optional.floatingpoint: 1
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_SME: 0
"""
INTEL_MAC = """\
machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz
machdep.cpu.features: FPU SSE4.2 AVX1.0 F16C
machdep.cpu.leaf7_features: BMI1 AVX2 BMI2
hw.optional.avx512f: 0
"""


@pytest.mark.parametrize(
    ("text", "name", "sets"),
    [
        (
            INTEL_AMX,
            "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
            ("AVX2", "AVX-512", "BF16", "VNNI", "AMX"),
        ),
        (AMD_AVX2, "AMD EPYC 7B13", ("AVX2",)),
        (ARM_SERVER, "Neoverse-V1", ("BF16", "NEON", "DOTPROD", "SVE")),
        (ARM_BOARD, "ARM implementer 0x41, part 0xd05 + ARM implementer 0x51, part 0x800", ("NEON",)),
        ("processor\t: 0\nuarch\t: sifive,u74-mc\n", "", ()),
        ("", "", ()),
        ("no colon at all\n\n\n\n:::\n", "", ()),
    ],
    ids=["Intel AMX", "AMD AVX2", "ARM server", "ARM board", "RISC-V", "empty", "nonsense"],
)
def test_linux_shows_name_and_instruction_sets(text, name, sets):
    assert from_cpuinfo(text) == (name, sets)


@pytest.mark.parametrize(
    ("text", "name", "sets"),
    [
        (APPLE, "Apple M2", ("BF16", "NEON", "DOTPROD")),
        (INTEL_MAC, "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz", ("AVX2",)),
        ("", "", ()),
    ],
    ids=["Apple", "Intel", "empty"],
)
def test_macos_shows_name_and_instruction_sets(text, name, sets):
    assert from_sysctl(text) == (name, sets)


@pytest.fixture
def unread(monkeypatch):
    """Nobody has asked for the processor yet."""
    monkeypatch.setattr(found_on, "_processor", found_on._processor.__wrapped__)


def test_this_machine_is_described():
    here = machine()
    assert here["cpu"]
    assert here["threads"] == torch.get_num_threads()
    assert here["kernels"] == torch.backends.cpu.get_cpu_capability()
    assert here["cores"] >= 1
    assert here["memory"] > 2**28
    assert json.loads(json.dumps(here)) == here
    assert all(str(here[name]) in described(here) for name in ("cpu", "cores", "threads"))


def refusing(error):
    def refuse(*_args, **_options):
        raise error

    return refuse


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("error", [FileNotFoundError("sysctl"), subprocess.TimeoutExpired("sysctl", 5)])
def test_what_a_system_does_not_tell_is_no_failure(system, error, monkeypatch):
    monkeypatch.setattr("sparlow.machine.sys.platform", system)
    monkeypatch.setattr("sparlow.machine.CPUINFO", Path("/nowhere/cpuinfo"))
    monkeypatch.setattr(subprocess, "run", refusing(error))
    monkeypatch.setattr("psutil.virtual_memory", refusing(OSError("no /proc")))
    monkeypatch.setattr("psutil.cpu_count", refusing(OSError("no /proc")))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", refusing(RuntimeError("no driver")))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    here = machine()
    assert here["cpu"]
    assert here["instruction_sets"] == ["AVX2", "AVX-512"]  # what torch's kernels say
    assert here["cores"] >= 1
    assert here["memory"] is None
    assert here["accelerator"] is None


@pytest.mark.usefixtures("unread")
def test_macos_is_asked_by_sysctl(monkeypatch):
    shown = subprocess.CompletedProcess((), 1, APPLE.encode())  # 1: a name it does not know was asked for too
    monkeypatch.setattr("sparlow.machine.sys.platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: shown)
    assert machine()["cpu"] == "Apple M2"


# What the bits depend on

HERE = {
    "system": "Linux-6.1",
    "cpu": "AMD EPYC 7B13",
    "instruction_sets": ["AVX2"],
    "kernels": "AVX2",
    "cores": 8,
    "threads": 8,
    "memory": 2**35,
    "accelerator": "NVIDIA L4",
    "device": "cpu",
    "torch": "2.13.0",
}


@pytest.mark.parametrize(
    "change",
    [{}, {"system": "Linux-6.2"}, {"memory": 2**36}, {"cores": 16}, {"accelerator": None}],
    ids=["nothing", "system", "memory", "cores", "an accelerator that is not used"],
)
def test_what_does_not_decide_the_bits_is_no_difference(change):
    assert differences(HERE, HERE | change) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 2}, ["threads (8, then 2)"]),
        (
            {"cpu": "Neoverse-V1", "kernels": "SVE256"},
            ["cpu (AMD EPYC 7B13, then Neoverse-V1)", "kernels (AVX2, then SVE256)"],
        ),
        ({"instruction_sets": []}, ["instruction sets (AVX2, then none)"]),
        ({"torch": "2.14.0"}, ["torch (2.13.0, then 2.14.0)"]),
        ({"device": "cuda"}, ["device (cpu, then cuda)"]),
    ],
)
def test_what_decides_the_bits_is_named(change, said):
    assert differences(HERE, HERE | change) == said


def test_an_accelerator_that_is_used_decides():
    first = HERE | {"device": "cuda"}
    assert differences(first, first | {"accelerator": "NVIDIA H100"}) == ["accelerator (NVIDIA L4, then NVIDIA H100)"]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (HERE, "AMD EPYC 7B13 (AVX2), cores: 8, threads: 8, 34.4 GB of memory, NVIDIA L4"),
        ({"system": "Linux", "threads": 1, "accelerator": None}, "Linux, threads: 1"),  # of an older report
        ({"cpu": "x", "instruction_sets": 5, "memory": "much"}, "x (5)"),
        ({}, "an unknown machine"),
    ],
)
def test_a_machine_in_one_line(record, said):
    assert described(record) == said


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep nothing, or cannot be told to")
def test_freed_memory_goes_back_to_the_system():
    torch.ones(2**22)  # 16 MB: from now on smaller ones are kept for later
    tensors = [torch.ones(2**20) for _ in range(20)]  # 4 MB each
    last = tensors.pop()  # above them, so that nothing shrinks by itself
    before = psutil.Process().memory_info().rss
    del tensors
    give_back()
    assert before - psutil.Process().memory_info().rss > 50e6
    assert last.sum() == len(last)


@pytest.mark.parametrize("looks", [True, False])
def test_garbage_waits_and_is_looked_for_again_as_before(looks, monkeypatch):
    told = []
    monkeypatch.setattr(gc, "isenabled", lambda: looks)
    monkeypatch.setattr(gc, "disable", lambda: told.append("off"))
    monkeypatch.setattr(gc, "enable", lambda: told.append("on"))
    with garbage_waits():
        assert told == ["off"]
    assert told == ["off", "on"][: 1 + looks]
