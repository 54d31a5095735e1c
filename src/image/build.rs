//! Builds an image: mmdebstrap installs the packages, mkfs.ext4 creates the file system without
//! mounting it, and the kernel and the modules of the initramfs come from the distribution's
//! package. `build.sh` does everything that needs root, in a user namespace if the daemon is not
//! root.

use super::checks::{Host, namespace, source_files};
use super::digest::record;
use super::initrd::write_initrd;
use super::registry::{INITRD, Images, KERNEL, Metadata, ROOTFS};
use super::unpack::unpack;
use super::{ImageInfo, apt_texts, kernel, sources};
use crate::error::{Error, Kind, Result};
use crate::host::text::{printable, quoted};
use crate::host::time::now_s;
use crate::host::{Command, Commands, Complaint, strerror};
use crate::ids::ImageRef;
use crate::locks::Cancel;
use std::path::Path;
use std::time::Duration;

/// The packages of every image, in addition to the distribution's essential ones: packages that fcd
/// uses in the guest (openssh-server, git, iproute2, e2fsprogs, kmod, mount), and a few that cost
/// little.
const PACKAGES: [&str; 13] = [
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
/// The packages of an image that is not minimal: what builds, tests and agents usually need.
const TOOL_PACKAGES: [&str; 14] = [
    "curl",
    "file",
    "gcc",
    "iputils-ping",
    "jq",
    "libc6-dev",
    "nano",
    "python3",
    "python3-pip",
    "python3-venv",
    "sudo",
    "unzip",
    "vim-tiny",
    "wget",
];
const BUILD_DEADLINE: Duration = Duration::from_secs(30 * 60);
/// The size limit of a build's tree, which is in a tmpfs and therefore uses memory.
const TREE_BYTES_MAX: u64 = 6 << 30;
const INCLUDE_MAX: usize = 256;
/// The number of error lines of a failed build that are shown.
const ERROR_LINES_MAX: usize = 3;
/// The build's stages. For a stage of `build.sh`, also the output line with which it begins.
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

/// What an image contains in addition to the packages that its builder names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Compilers, Python and the usual tools, the CA certificates that the host's administrator
    /// added, and an ordinary user `dev`.
    Full,
    /// Only what fcd itself needs.
    Minimal,
}

impl Profile {
    fn packages(self) -> impl Iterator<Item = &'static str> {
        let tools: &[&str] = match self {
            Self::Full => &TOOL_PACKAGES,
            Self::Minimal => &[],
        };
        PACKAGES.iter().chain(tools).copied()
    }

    /// The word that tells `build.sh` about the profile.
    fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Minimal => "minimal",
        }
    }
}

/// The image to build.
#[derive(Clone, Debug)]
pub struct BuildSpec {
    pub name: ImageRef,
    /// Packages of the distribution in addition to those of the profile.
    pub include: Vec<String>,
    pub profile: Profile,
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
    let packages = package_list(spec.profile, &spec.include)?;
    let staging = images.stage(&spec.name)?;
    let host = Host::this();
    host.ready(commands, cancel).map_err(doing)?;
    let suite = write_inputs(staging.path(), commands, cancel).map_err(doing)?;
    let command = script_command(host.is_root(), staging.path(), &suite, &packages, spec);
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

/// Returns all packages to install. Checks that the names in `include` are names of Debian packages
/// (Policy 5.6.1), so that none of them is an option of mmdebstrap or apt.
fn package_list(profile: Profile, include: &[String]) -> Result<Vec<String>> {
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
    let mut packages: Vec<String> = profile
        .packages()
        .map(str::to_owned)
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
            "add this line to /etc/apt/sources.list, replacing MIRROR with your Debian mirror: deb MIRROR {} main",
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
    spec: &BuildSpec,
) -> Command {
    let mut command = namespace(root)
        .arg("sh")
        .arg(stage.join("in/build.sh"))
        .arg(stage)
        .args([
            suite,
            &packages.join(","),
            &spec.disk_bytes.to_string(),
            &TREE_BYTES_MAX.to_string(),
            spec.profile.word(),
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
        let spec = |profile, disk_bytes| BuildSpec {
            name: "a".parse().unwrap(),
            include: Vec::new(),
            profile,
            disk_bytes,
            owner_uid: 0,
        };
        let full = spec(Profile::Full, 8 << 30);
        check(
            &script_command(false, stage, "bookworm", &packages, &full),
            expect![
                "setpriv --pdeathsig KILL unshare --user --map-root-user --map-auto --mount --propagation private --pid --fork \
                 --kill-child sh /s/images/.building-a-1/in/build.sh /s/images/.building-a-1 bookworm git,make 8589934592 6442450944 full"
            ],
        );
        check(
            &script_command(
                true,
                stage,
                "trixie",
                &packages[..1],
                &spec(Profile::Minimal, 4096),
            ),
            expect![
                "setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork --kill-child sh \
                 /s/images/.building-a-1/in/build.sh /s/images/.building-a-1 trixie git 4096 6442450944 minimal"
            ],
        );
    }

    #[test]
    fn package_names() {
        let include = ["gcc", "g++", "git", "libc6-dev"].map(str::to_owned);
        let list = package_list(Profile::Minimal, &include).unwrap();
        assert_eq!(list.len(), PACKAGES.len() + 3);
        assert!(list.is_sorted());
        let list = package_list(Profile::Full, &include).unwrap();
        assert_eq!(list.len(), PACKAGES.len() + TOOL_PACKAGES.len() + 1);
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
                package_list(Profile::Full, &[bad.to_owned()])
                    .unwrap_err()
                    .kind(),
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
}
