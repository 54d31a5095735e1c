//! Builds an image: mmdebstrap installs the packages, mkfs.ext4 creates the file system without
//! mounting it, and the kernel and the modules of the initramfs come from the distribution's
//! package. `build.sh` does everything that needs root, in a user namespace if the daemon is not
//! root.

use super::checks::{Host, namespace, source_files};
use super::cpio::Cpio;
use super::kernel::Compression;
use super::registry::{FileRecord, INITRD, Images, KERNEL, Metadata, ROOTFS};
use super::{ImageInfo, apt_texts, kernel, sources};
use crate::error::{Error, Kind, Result};
use crate::host::text::{printable, quoted};
use crate::host::time::now_s;
use crate::host::{Command, Commands, Complaint, hex, strerror};
use crate::ids::ImageRef;
use crate::locks::Cancel;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// The packages of every image, in addition to the distribution's essential ones: those that fcd
/// uses in the guest (openssh-server, git, iproute2, e2fsprogs, kmod, mount), and those that
/// developers expect.
pub const PACKAGES: [&str; 13] = [
    "apt",
    "ca-certificates",
    "e2fsprogs",
    "git",
    "iproute2",
    "kmod",
    "less",
    "make",
    "mount",
    "netbase",
    "openssh-server",
    "patch",
    "procps",
];
const BUILD_DEADLINE: Duration = Duration::from_secs(30 * 60);
const UNPACK_DEADLINE: Duration = Duration::from_secs(60);
/// Limits the memory of a build, whose tree is in a tmpfs.
const TREE_BYTES_MAX: u64 = 6 << 30;
const INCLUDE_MAX: usize = 256;
const BLOCK: usize = 4096;
/// How many error lines of a failed build are shown.
const ERROR_LINES_MAX: usize = 3;
/// The largest part of the initramfs.
pub(super) const PART_BYTES_MAX: u64 = 64 << 20;

/// The drivers of the transports and devices. modprobe loads their dependencies.
const INITRD_MODULES: &str = "virtio_pci virtio_mmio virtio_blk virtio_net virtio_balloon";
const BUSYBOX_APPLETS: [&str; 6] = ["sh", "modprobe", "mount", "sleep", "switch_root", "usleep"];

/// The build's stages, and for those of `build.sh` the output line that begins each.
const STAGES: [(&str, &str); 11] = [
    ("check the host", ""),
    ("update package lists", "I: running apt-get update"),
    ("download packages", "I: downloading packages"),
    ("extract packages", "I: extracting archives"),
    ("install packages", "I: installing essential packages"),
    ("fetch kernel", "I: running --customize-hook"),
    ("unpack kernel", "fcd-stage kernel"),
    ("set up the guest", "fcd-stage customise"),
    ("make file system", "fcd-stage filesystem"),
    ("make initramfs", ""),
    ("publish", ""),
];
const STAGE_INITRAMFS: usize = 9;
const STAGE_PUBLISH: usize = 10;

/// The files that are written to the staging directory for `build.sh`.
const INPUTS: [(&str, &str); 6] = [
    ("build.sh", include_str!("build.sh")),
    ("fetch.sh", include_str!("fetch.sh")),
    ("init", include_str!("guest/init")),
    ("shutdown", include_str!("guest/shutdown")),
    ("sshd_config", include_str!("guest/sshd_config")),
    ("modprobe.conf", include_str!("guest/modprobe.conf")),
];
const INITRD_INIT: &str = include_str!("guest/initrd-init");

/// What to build.
#[derive(Clone, Debug)]
pub struct BuildSpec {
    pub name: ImageRef,
    /// Packages of the distribution in addition to [`PACKAGES`].
    pub include: Vec<String>,
    /// The virtual size of the root disk, a multiple of 1 MiB; see [`super::DISK_BYTES_DEFAULT`].
    pub disk_bytes: u64,
    pub owner_uid: u32,
}

/// Builds an image and publishes it. `progress` receives the stage, the number of stages done, and
/// their total. A build that fails leaves nothing behind.
///
/// # Errors
/// `name_taken`, `invalid_argument` (package names), `command_missing`, `unsupported` (no
/// subordinate ids or no sources for this distribution), `denied` (no namespaces), `command_failed`
/// with mmdebstrap's own error lines, `disk_full`, `cancelled`.
pub fn build(
    images: &Images,
    commands: &dyn Commands,
    spec: &BuildSpec,
    cancel: &Cancel,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<ImageInfo> {
    let mut report = |stage: usize| progress(STAGES[stage].0, stage as u64, STAGES.len() as u64);
    let doing = |e: Error| e.context(format!("build image {}", spec.name));
    report(0);
    let packages = package_list(&spec.include)?;
    let staging = images.stage(&spec.name)?;
    let host = Host::this();
    host.ready(commands, cancel).map_err(doing)?;
    let suite = write_inputs(staging.path(), commands, cancel).map_err(doing)?;
    let command = script_command(
        host.is_root(),
        staging.path(),
        &suite,
        &packages,
        spec.disk_bytes,
    );
    run_script(commands, &command, cancel, &mut report).map_err(doing)?;

    report(STAGE_INITRAMFS);
    let out = staging.path().join("out");
    let mut metadata = Metadata::new(&spec.name, &packages, now_s());
    metadata.owner_uid = Some(spec.owner_uid);
    metadata.os = read_line(&out, "os")?;
    metadata.kernel_version = read_line(&out, "kernel-version")?;
    unpack_kernel(commands, &out, cancel).map_err(doing)?;
    write_initrd(&out, &metadata.kernel_version).map_err(doing)?;
    std::fs::remove_dir_all(out.join("modules"))
        .map_err(|e| doing(Error::io("remove modules", e)))?;
    for name in ["vmlinuz", "busybox", "os", "kernel-version"] {
        std::fs::remove_file(out.join(name))
            .map_err(|e| doing(Error::io(format!("remove {name}"), e)))?;
    }

    report(STAGE_PUBLISH);
    for name in [KERNEL, INITRD, ROOTFS] {
        metadata
            .files
            .push(record(&out, name, cancel).map_err(doing)?);
    }
    let info = images.publish(&out, &metadata)?;
    progress(
        STAGES[STAGE_PUBLISH].0,
        STAGES.len() as u64,
        STAGES.len() as u64,
    );
    Ok(info)
}

/// Checks that the names are names of Debian packages (Policy 5.6.1), so that none of them is an
/// option of mmdebstrap or apt.
fn package_list(include: &[String]) -> Result<Vec<String>> {
    if include.len() > INCLUDE_MAX {
        return Err(Error::invalid(format!(
            "more than {INCLUDE_MAX} packages to include"
        )));
    }
    for name in include {
        let good = name.len() >= 2
            && name.as_bytes()[0].is_ascii_alphanumeric()
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
            // apt reads a trailing sign as a request to remove or install.
            && !name.ends_with(['+', '-']);
        // The exception is a package whose real name ends with a sign.
        if !good && name != "g++" {
            return Err(
                Error::invalid(format!("package name {} is not valid", quoted(name)))
                    .hint("name packages of the distribution, such as gcc"),
            );
        }
    }
    let mut packages: Vec<String> = PACKAGES
        .iter()
        .map(|p| (*p).to_owned())
        .chain(include.iter().cloned())
        .collect();
    packages.sort();
    packages.dedup();
    Ok(packages)
}

/// Fills the directory `in`, creates `work` and `out`, and returns the suite.
fn write_inputs(stage: &Path, commands: &dyn Commands, cancel: &Cancel) -> Result<String> {
    let root = Path::new("/");
    let os = sources::os(&std::fs::read_to_string(root.join("etc/os-release")).unwrap_or_default());
    if os.id != "debian" || os.codename.is_empty() {
        let text = format!(
            "images are built from Debian's archive, but this host runs {:?} {:?}",
            os.id, os.codename
        );
        return Err(Error::new(Kind::Unsupported, text)
            .hint("build the image on Debian 12 or newer and copy its directory"));
    }
    let sources = sources::sources_list(&source_files(root), &os.codename);
    if sources.is_empty() {
        let text = format!("/etc/apt has no source for {} main", os.codename);
        return Err(Error::new(Kind::Unsupported, text).hint(format!(
            "add to /etc/apt/sources.list, with your mirror of Debian: deb MIRROR {} main",
            os.codename
        )));
    }
    let dump = commands.run(&Command::new("apt-config").arg("dump"), cancel, &mut |_| {})?;
    let conf = sources::apt_conf(&String::from_utf8_lossy(&dump.stdout));
    let io = |e| Error::io(format!("write {}", stage.display()), e);
    for dir in ["in", "work", "out"] {
        std::fs::create_dir(stage.join(dir)).map_err(io)?;
    }
    for (name, text) in INPUTS
        .into_iter()
        .chain([("sources.list", sources.as_str()), ("apt.conf", &conf)])
    {
        std::fs::write(stage.join("in").join(name), text).map_err(io)?;
    }
    Ok(os.codename)
}

fn script_command(
    root: bool,
    stage: &Path,
    suite: &str,
    packages: &[String],
    disk_bytes: u64,
) -> Command {
    let mut command = namespace(root)
        .arg("sh")
        .arg(stage.join("in/build.sh"))
        .arg(stage)
        .args([
            suite,
            &packages.join(","),
            &disk_bytes.to_string(),
            &TREE_BYTES_MAX.to_string(),
        ])
        .deadline(BUILD_DEADLINE);
    for key in ["http_proxy", "https_proxy", "no_proxy"] {
        if let Some(value) = std::env::var_os(key) {
            command = command.env(key, value);
        }
    }
    command
}

fn run_script(
    commands: &dyn Commands,
    command: &Command,
    cancel: &Cancel,
    report: &mut dyn FnMut(usize),
) -> Result<()> {
    let mut errors: Vec<String> = Vec::new();
    let ran = commands.run(command, cancel, &mut |line| {
        log::debug!("image build: {}", printable(line));
        if let Some(stage) = stage_of(line) {
            report(stage);
        }
        if let Some(text) = apt_texts::reason(line)
            && errors.len() < ERROR_LINES_MAX
        {
            errors.push(printable(text));
        }
    });
    let Err(e) = ran else { return Ok(()) };
    if e.kind() != Kind::CommandFailed {
        return Err(e);
    }
    if strerror::says_disk_full(Complaint::of(&e))
        || errors.iter().any(|line| strerror::says_disk_full(line))
    {
        return Err(e
            .with_kind(Kind::DiskFull)
            .hint("free some space (df -h) and memory (free -h), then try again"));
    }
    if let Some(line) = errors
        .iter()
        .find(|line| apt_texts::is_unknown_package(line))
    {
        return Err(
            Error::invalid(line.to_lowercase()).hint("search for the name: apt-cache search TEXT")
        );
    }
    if errors.is_empty() {
        Err(e)
    } else {
        Err(Error::new(
            Kind::CommandFailed,
            format!("mmdebstrap: {}", errors.join("; ")),
        ))
    }
}

fn stage_of(line: &str) -> Option<usize> {
    STAGES
        .iter()
        .position(|(_, mark)| !mark.is_empty() && line.starts_with(mark))
}

fn read_line(dir: &Path, name: &str) -> Result<String> {
    let text = std::fs::read_to_string(dir.join(name))
        .map_err(|e| Error::io(format!("read {name}"), e))?;
    Ok(text.trim().to_owned())
}

/// Unpacks `vmlinuz` to `vmlinux`.
fn unpack_kernel(commands: &dyn Commands, out: &Path, cancel: &Cancel) -> Result<()> {
    let image =
        std::fs::read(out.join("vmlinuz")).map_err(|e| Error::io("read the kernel image", e))?;
    unpack(commands, &kernel::payload(&image)?, out, cancel)
}

/// Unpacks a bzImage's payload to `out/vmlinux`.
pub(super) fn unpack(
    commands: &dyn Commands,
    payload: &kernel::Payload<'_>,
    out: &Path,
    cancel: &Cancel,
) -> Result<()> {
    let packed = out.join(format!("vmlinux.{}", payload.compression.program().1));
    std::fs::write(&packed, payload.bytes)
        .map_err(|e| Error::io("write the kernel's payload", e))?;
    unpack_file(
        commands,
        payload.compression,
        (&packed, &out.join(KERNEL)),
        payload.unpacked_bytes.into(),
        cancel,
    )?;
    let file =
        File::open(out.join(KERNEL)).map_err(|e| Error::io("open the unpacked kernel", e))?;
    let mut magic = [0; 4];
    let is_elf = file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"\x7fELF";
    let bytes = file
        .metadata()
        .map_err(|e| Error::io("read the unpacked kernel's size", e))?
        .len();
    if !is_elf || bytes != u64::from(payload.unpacked_bytes) {
        return Err(Error::new(
            Kind::Unsupported,
            "the unpacked kernel is not a complete ELF file",
        ));
    }
    Ok(())
}

/// Unpacks `packed` to `to` and removes it. `packed` has the suffix of its compression, and `to` is
/// its name without that. A small file that unpacks to more than `bytes_max` is refused, so that it
/// cannot fill the disk.
pub(super) fn unpack_file(
    commands: &dyn Commands,
    compression: Compression,
    (packed, to): (&Path, &Path),
    bytes_max: u64,
    cancel: &Cancel,
) -> Result<()> {
    let command = unpack_command(compression, packed, to).file_bytes_max(bytes_max);
    commands
        .run(&command, cancel, &mut |_| {})
        .map_err(|e| match e.kind() {
            Kind::CommandMissing => {
                e.hint(format!("sudo apt-get install {}", compression.program().0))
            }
            Kind::CommandFailed => e.hint(format!(
                "it is damaged, or larger than {bytes_max} bytes when unpacked"
            )),
            _ => e,
        })?;
    match std::fs::remove_file(packed) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", packed.display()), e))
        }
        _ => Ok(()),
    }
}

fn unpack_command(compression: Compression, packed: &Path, to: &Path) -> Command {
    let command = Command::new(compression.program().0)
        .args(["-d", "-f", "-q"])
        .arg(packed)
        .deadline(UNPACK_DEADLINE);
    match compression {
        Compression::Lz4 => command.arg(to),
        Compression::Zstd => command.arg("-o").arg(to),
        // These write to the name of the input without its suffix.
        Compression::Xz | Compression::Gzip => command,
    }
}

/// Writes `initrd`, the initramfs, from the files `busybox` and `modules`.
fn write_initrd(out: &Path, kernel_version: &str) -> Result<()> {
    let read = |path: &Path| {
        let file =
            File::open(path).and_then(|f| crate::host::command::read_bounded(f, PART_BYTES_MAX));
        file.map_err(|e| Error::io(format!("read {}", path.display()), e))
    };
    let mut modules = Vec::new();
    let mut modules_dep = String::new();
    let io = |e| Error::io("read the modules", e);
    for entry in std::fs::read_dir(out.join("modules")).map_err(io)? {
        let entry = entry.map_err(io)?;
        let bytes = read(&entry.path())?;
        match entry
            .file_name()
            .into_string()
            .ok()
            .filter(|n| n != "modules.dep")
        {
            Some(name) => modules.push((name, bytes)),
            None => modules_dep = String::from_utf8_lossy(&bytes).into_owned(),
        }
    }
    modules.sort();
    let busybox = read(&out.join("busybox"))?;
    let bytes = initrd(
        &busybox,
        &modules,
        &modules_dep,
        kernel_version,
        INITRD_MODULES,
    );
    std::fs::write(out.join(INITRD), bytes).map_err(|e| Error::io("write the initramfs", e))
}

pub(super) fn initrd(
    busybox: &[u8],
    modules: &[(String, Vec<u8>)],
    modules_dep: &str,
    kernel_version: &str,
    wanted: &str,
) -> Vec<u8> {
    let mut cpio = Cpio::new();
    let modules_dir = format!("lib/modules/{kernel_version}");
    for dir in [
        "bin",
        "dev",
        "proc",
        "sys",
        "root",
        "lib",
        "lib/modules",
        &modules_dir,
    ] {
        cpio.dir(dir, 0o755);
    }
    cpio.file(
        "init",
        0o755,
        INITRD_INIT.replace("@MODULES@", wanted).as_bytes(),
    );
    cpio.file("bin/busybox", 0o755, busybox);
    for applet in BUSYBOX_APPLETS {
        cpio.symlink(&format!("bin/{applet}"), "busybox");
    }
    for (name, bytes) in modules {
        cpio.file(
            &format!("{modules_dir}/{name}"),
            0o644,
            kernel::without_signature(bytes),
        );
    }
    let names: Vec<_> = modules.iter().map(|(name, _)| name.clone()).collect();
    cpio.file(
        &format!("{modules_dir}/modules.dep"),
        0o644,
        kernel::flat_modules_dep(modules_dep, &names).as_bytes(),
    );
    cpio.finish()
}

/// The size and the digest of a file. The root file system is sparse, so its digest covers only its
/// non-zero blocks of 4096 bytes, each preceded by its number (64 bits, little-endian). The digest
/// then does not depend on where the holes are.
fn record(dir: &Path, name: &str, cancel: &Cancel) -> Result<FileRecord> {
    let io = |e: std::io::Error| Error::io(format!("hash {name}"), e);
    let file = File::open(dir.join(name)).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    let sparse = name == ROOTFS;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 * BLOCK];
    let mut at = 0;
    while at < bytes {
        if let Some(cause) = cancel.cause() {
            return Err(Error::new(
                Kind::Cancelled,
                format!("hash {name}: cancelled: {cause}"),
            ));
        }
        if sparse {
            match rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::Data(at)) {
                Ok(data) => at = data / BLOCK as u64 * BLOCK as u64,
                Err(rustix::io::Errno::NXIO) => break,
                Err(e) => return Err(io(e.into())),
            }
        }
        let n = file.read_at(&mut buffer, at).map_err(io)?;
        if n == 0 {
            break;
        }
        if sparse {
            for (i, block) in buffer[..n]
                .chunks(BLOCK)
                .enumerate()
                .filter(|(_, b)| b.iter().any(|byte| *byte != 0))
            {
                hash.update((at / BLOCK as u64 + i as u64).to_le_bytes());
                hash.update(block);
            }
        } else {
            hash.update(&buffer[..n]);
        }
        at += n as u64;
    }
    let sha256 = hex::encode(&hash.finalize());
    Ok(FileRecord {
        name: name.to_owned(),
        bytes,
        sha256,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    #[track_caller]
    fn check(command: &Command, expected: Expect) {
        let words: Vec<_> = std::iter::once(&command.program)
            .chain(&command.args)
            .map(|a| a.to_string_lossy())
            .collect();
        expected.assert_eq(&words.join(" "));
    }

    #[test]
    fn argv() {
        let packages = ["git".to_owned(), "make".to_owned()];
        let stage = Path::new("/s/images/.building-a-1");
        check(
            &script_command(false, stage, "bookworm", &packages, 8 << 30),
            expect![
                "setpriv --pdeathsig KILL unshare --user --map-root-user --map-auto --mount --propagation private --pid --fork \
                 --kill-child sh /s/images/.building-a-1/in/build.sh /s/images/.building-a-1 bookworm git,make 8589934592 6442450944"
            ],
        );
        check(
            &script_command(true, stage, "trixie", &packages[..1], 4096),
            expect![
                "setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork --kill-child sh \
                 /s/images/.building-a-1/in/build.sh /s/images/.building-a-1 trixie git 4096 6442450944"
            ],
        );
    }

    #[test]
    fn payload_of_every_compression_is_unpacked() {
        let text = b"\x7fELF and so on".repeat(10);
        let cancel = Cancel::try_new().unwrap();
        for compression in [
            Compression::Lz4,
            Compression::Zstd,
            Compression::Xz,
            Compression::Gzip,
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (program, suffix) = compression.program();
            let (plain, packed) = (
                dir.path().join("vmlinux"),
                dir.path().join(format!("vmlinux.{suffix}")),
            );
            std::fs::write(&plain, &text).unwrap();
            // The kernel's build uses lz4's legacy frame (-l).
            let pack = Command::new(program)
                .args(if program == "lz4" {
                    &["-q", "-l"][..]
                } else {
                    &["-q"][..]
                })
                .arg(&plain);
            let pack = if program == "lz4" {
                pack.arg(&packed)
            } else {
                pack
            };
            crate::host::HostCommands
                .run(&pack, &cancel, &mut |_| {})
                .unwrap();
            let _ = std::fs::remove_file(&plain);
            let command = unpack_command(compression, &packed, &plain);
            crate::host::HostCommands
                .run(&command, &cancel, &mut |_| {})
                .unwrap();
            assert_eq!(std::fs::read(&plain).unwrap(), text, "{program}");
        }
    }

    #[test]
    fn package_names() {
        let list = package_list(&[
            "gcc".to_owned(),
            "g++".to_owned(),
            "git".to_owned(),
            "libc6-dev".to_owned(),
        ])
        .unwrap();
        assert_eq!(list.len(), PACKAGES.len() + 3);
        assert!(list.is_sorted());
        for bad in [
            "",
            "a",
            "--help",
            "a,b",
            "a b",
            "gcc-",
            "A1",
            "git=1",
            "../x",
            "?essential",
        ] {
            assert_eq!(
                package_list(&[bad.to_owned()]).unwrap_err().kind(),
                Kind::InvalidArgument,
                "{bad}"
            );
        }
    }

    #[test]
    fn script_announces_its_stages() {
        let script = include_str!("build.sh");
        for (name, mark) in STAGES.iter().filter(|(_, m)| m.starts_with("fcd-stage ")) {
            assert!(
                script.contains(&format!("stage {}\n", &mark["fcd-stage ".len()..])),
                "{name}"
            );
        }
        assert_eq!(stage_of("I: downloading packages with apt..."), Some(2));
        assert_eq!(stage_of("anything"), None);
    }

    #[test]
    fn failed_build_shows_its_error_lines() {
        struct Fails(&'static [&'static str]);
        impl Commands for Fails {
            fn run(
                &self,
                _: &Command,
                _: &Cancel,
                on_line: &mut dyn FnMut(&str),
            ) -> Result<crate::host::Output> {
                self.0.iter().for_each(|l| on_line(l));
                Err(
                    Error::new(Kind::CommandFailed, "setpriv failed with status 1")
                        .with_source(Complaint("bye".to_owned())),
                )
            }
        }
        let run = |lines| {
            let mut seen = Vec::new();
            let cancel = Cancel::try_new().unwrap();
            let e = run_script(&Fails(lines), &Command::new("x"), &cancel, &mut |s| {
                seen.push(s)
            })
            .unwrap_err();
            (e.kind(), e.to_string(), seen)
        };
        let (kind, text, seen) = run(&[
            "I: extracting archives...",
            "E: broken",
            "E: very",
            "E: setup failed: E: apt",
        ]);
        assert_eq!((kind, seen), (Kind::CommandFailed, vec![3]));
        assert_eq!(text, "mmdebstrap: broken; very");
        assert_eq!(
            run(&["E: Unable to locate package foo"]).0,
            Kind::InvalidArgument
        );
        assert_eq!(
            run(&["E: write: No space left on device"]).0,
            Kind::DiskFull
        );
        assert!(run(&[]).1.contains("bye"));
    }

    #[test]
    fn initramfs_is_complete_and_reproducible() {
        let modules = [("a.ko".to_owned(), b"module".to_vec())];
        let make = || {
            initrd(
                b"busybox",
                &modules,
                "kernel/x/a.ko:\n",
                "6.1",
                INITRD_MODULES,
            )
        };
        let bytes = make();
        assert_eq!(bytes, make());
        let text = String::from_utf8_lossy(&bytes);
        for part in [
            "lib/modules/6.1/a.ko",
            "lib/modules/6.1/modules.dep",
            "bin/modprobe",
            INITRD_MODULES,
            "TRAILER!!!",
        ] {
            assert!(text.contains(part), "{part}");
        }
        assert!(!text.contains("@MODULES@"));
    }

    #[test]
    fn digest_of_sparse_file_does_not_depend_on_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ROOTFS);
        let cancel = Cancel::try_new().unwrap();
        let file = File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_at(b"x", 700_000).unwrap();
        let sparse = record(dir.path(), ROOTFS, &cancel).unwrap();
        let mut full = vec![0; 1 << 20];
        full[700_000] = b'x';
        std::fs::write(&path, &full).unwrap();
        assert_eq!(record(dir.path(), ROOTFS, &cancel).unwrap(), sparse);
        full[700_001] = b'x';
        std::fs::write(&path, &full).unwrap();
        assert_ne!(record(dir.path(), ROOTFS, &cancel).unwrap(), sparse);
    }
}
