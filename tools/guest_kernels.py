"""The kernels that tools/kernel can boot: User-Mode Linux, and Debian's own inside QEMU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
UML_MODULES = Path("/usr/lib/uml/modules")
# In the order in which they must be loaded; nbd is last because it is optional.
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("virtio_blk", "virtio_console", "netfs", "fscache", "9pnet", "9pnet_virtio", "9p"),
    *("crc16", "crc32c_generic", "mbcache", "jbd2", "ext4", "nbd"),
)

# Stock kernels hang under nested KVM on some hosts; TCG runs everywhere.
# It translates code once for every address and set of features that it is run with: five
# starts of Python took 7.2 s with "max", 6.1 with this one, 4.3 with norandmaps, too.
EMULATION = ("-accel", "tcg,thread=multi", "-cpu", "Nehalem")
FOR_EMULATION = "mitigations=off norandmaps"  # the kernel's parameters


class Missing(Exception):
    """Something to install first."""


@dataclass(frozen=True)
class Guest:
    """How to boot a kernel, and the names of its devices as seen inside."""

    name: str
    command: list[str]
    disks: list[str]
    nbd_module: str  # a path inside the guest
    stdout: str  # terminals, or the names of virtio ports
    stderr: str
    status: str


def require(commands: dict[str, str]) -> None:
    """Raise Missing when a command is absent; `commands` maps each to its Debian package."""
    packages = {package for command, package in commands.items() if not shutil.which(command)}
    if packages:
        names = " ".join(sorted(packages))
        raise Missing(f"missing packages; install them with: apt-get install {names}")


def user_mode_linux(bed: Path, memory: int, disks: list[str], streams: list[int]) -> Guest:
    """Return the User-Mode Linux kernel: one CPU, boots in seconds."""
    require({"linux.uml": "user-mode-linux", "ip": "iproute2"})
    modules = sorted(UML_MODULES.glob("*/kernel/drivers/block/nbd.ko"))
    if not modules:
        raise Missing(f"no nbd module under {UML_MODULES}; reinstall the package user-mode-linux")
    letters = "abcdefgh"[: len(disks)]
    command = [
        *for_this_cpu(bed),
        "linux.uml",
        f"mem={memory}M",
        "root=/dev/root",
        "rootfstype=hostfs",
        "rootflags=/",
        "rw",
        f"init={TOOLS}/kernel-init.sh",
        f"BED={bed}",
        f"uml_dir={bed}/",
        "con=null",
        "con0=null,fd:1",  # kernel messages; the command's output has serial lines of its own
        "quiet",
        "log_buf_len=4M",
        # t: discard punches holes in the image
        *(
            f"ubd{letter}t={Path(disk).absolute()}"
            for letter, disk in zip(letters, disks, strict=True)
        ),
        *(f"ssl{line}=null,fd:{stream}" for line, stream in enumerate(streams)),
    ]
    inside = [f"/dev/ubd{letter}" for letter in letters]
    return Guest("uml", command, inside, str(modules[-1]), "/dev/ttyS0", "/dev/ttyS1", "/dev/ttyS2")


def for_this_cpu(bed: Path) -> list[str]:
    """Return what must stand before the command of User-Mode Linux."""
    if " amx_tile" not in Path("/proc/cpuinfo").read_text():
        return []
    require({"gcc": "gcc libc6-dev"})
    library = bed / "xstate.so"
    source = TOOLS / "kernel-xstate.c"
    compiler = ["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(source)]
    if subprocess.run(compiler, check=False).returncode:
        raise Missing(f"{source.name} cannot be compiled: apt-get install libc6-dev")
    return ["env", f"LD_PRELOAD={library}"]


def qemu(bed: Path, memory: int, disks: list[str], streams: list[int], cpus: int) -> Guest:
    """Return the stock Debian kernel in QEMU's emulation, with `cpus` CPUs."""
    require(
        {
            "qemu-system-x86_64": "qemu-system-x86",
            "busybox": "busybox-static",
            "apt-get": "apt",
            "ip": "iproute2",
        }
    )
    kernel = debian_kernel()
    initramfs = make_initramfs(bed, kernel)
    command = [
        "qemu-system-x86_64",
        *(*EMULATION, "-smp", str(cpus), "-m", str(memory)),
        *("-nographic", "-no-reboot", "-nic", "none", "-monitor", "none"),
        *("-kernel", str(kernel / "vmlinuz"), "-initrd", str(initramfs)),
        "-append",
        f"console=ttyS0 quiet log_buf_len=4M panic=-1 rdinit=/init {FOR_EMULATION}"
        f" TOOLS={TOOLS} BED={bed}",
        "-virtfs",
        "local,path=/,mount_tag=rootfs,security_model=none,multidevs=remap",
        *("-device", "virtio-serial"),
    ]
    for name, stream in zip(("stdout", "stderr", "status"), streams, strict=True):
        command += ["-chardev", f"file,id={name},path=/proc/self/fd/{stream}"]
        command += ["-device", f"virtserialport,chardev={name},name={name}"]
    for disk in disks:
        path = str(Path(disk).absolute()).replace(",", ",,")
        command += ["-drive", f"file={path},format=raw,if=virtio,discard=unmap,cache=unsafe"]
    inside = [f"/dev/vd{letter}" for letter in "abcdefgh"[: len(disks)]]
    return Guest("qemu", command, inside, str(kernel / "nbd.ko"), "stdout", "stderr", "status")


def debian_kernel() -> Path:
    """Return the directory with the stock kernel and the modules, fetched once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbd-reactor"
    ready = sorted(cache.glob("linux-image-*/nbd.ko"))
    if ready:
        return ready[-1].parent
    cache.mkdir(parents=True, exist_ok=True)
    print("kernel: fetching the Debian kernel (70 MB), once", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as directory:
        package = kernel_package()
        fetched = subprocess.run(
            ["apt-get", "download", package],
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
        )
        archives = sorted(Path(directory).glob("*.deb"))
        if fetched.returncode or not archives:
            lines = fetched.stderr.strip().splitlines() or ["no archive"]
            raise Missing(f"cannot fetch {package} (run apt-get update?): {lines[-1]}")
        unpacked = Path(directory) / "unpacked"
        unpacked.mkdir()
        unpack(archives[0], unpacked)
        destination = cache / archives[0].stem
        if not destination.exists():  # another run may have been faster
            unpacked.rename(destination)
    return destination


def kernel_package() -> str:
    """Return the name of the package that linux-image-amd64 stands for."""
    depends = subprocess.run(
        ["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=False
    )
    for line in depends.stdout.splitlines():
        relation, _, package = line.strip().partition(": ")
        if relation == "Depends" and package.startswith("linux-image-"):
            return package
    raise Missing("the package linux-image-amd64 is not known here; run apt-get update")


def unpack(archive: Path, destination: Path) -> None:
    """Take the kernel and the modules out of a Debian package."""
    wanted = {f"{module}.ko" for module in MODULES}
    with (
        subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE
        ) as dpkg,
        tarfile.open(fileobj=dpkg.stdout, mode="r|") as members,
    ):
        for member in members:
            name = Path(member.name).name
            is_kernel = member.name.startswith("./boot/vmlinuz-")
            if member.isfile() and (is_kernel or name in wanted):
                source = members.extractfile(member)
                assert source is not None
                (destination / ("vmlinuz" if is_kernel else name)).write_bytes(source.read())
    missing = {*wanted, "vmlinuz"} - {entry.name for entry in destination.iterdir()}
    if missing:
        raise Missing(f"{archive.name} lacks {' '.join(sorted(missing))}")


def make_initramfs(bed: Path, kernel: Path) -> Path:
    """Build the file system that mounts the host's root: busybox and the modules."""
    root = bed / "initramfs.d"
    for directory in ("proc", "sys", "dev", "host", "bin", "modules"):
        (root / directory).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy2(busybox, root / "bin/busybox")
    shutil.copy2(TOOLS / "kernel-initramfs.sh", root / "init")
    # nbd.ko is loaded later, from the host's files.
    for module in MODULES[:-1]:
        shutil.copy2(kernel / f"{module}.ko", root / "modules")
    (root / "modules/order").write_text(" ".join(MODULES[:-1]))
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = bed / "initramfs"
    with archive.open("wb") as output:
        subprocess.run(
            ["busybox", "cpio", "-o", "-H", "newc"],
            cwd=root,
            input=names.encode(),
            stdout=output,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    return archive
