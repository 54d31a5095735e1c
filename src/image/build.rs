//! Builds an image: mmdebstrap installs the packages, mkfs.ext4 creates the file system without
//! mounting it, and the kernel and the modules of the initramfs come from the distribution's
//! package. `build.sh` does everything that needs root, in a user namespace if the daemon is not
//! root.

use super::checks::Host;
use super::digest::record;
use super::disk_use::DiskUse;
use super::initrd::write_initrd;
use super::registry::{INITRD, Images, KERNEL, Metadata, ROOTFS};
use super::script::{
    Input, Stage, read_line, run_script, script_command, unpack_kernel, write_inputs,
};
use super::{Admit, ImageInfo};
use crate::error::{Error, Result};
use crate::host::Commands;
use crate::host::text::quoted;
use crate::host::time::now_s;
use crate::ids::ImageRef;
use crate::locks::Cancel;

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
/// The additional packages of an image that is not minimal, which builds, tests and agents usually
/// need.
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
/// The size limit of a build's tree, which is in a tmpfs and therefore uses memory.
const TREE_BYTES_MAX: u64 = 6 << 30;
const INCLUDE_MAX: usize = 256;
const STAGES: [Stage; 11] = [
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
    ("certificates.sh", include_str!("certificates.sh")),
    ("fetch.sh", include_str!("fetch.sh")),
    ("shutdown", include_str!("guest/shutdown")),
    ("sshd_config", include_str!("guest/sshd_config")),
    ("modprobe.conf", include_str!("guest/modprobe.conf")),
];

/// The content of an image in addition to the packages that its builder names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Compilers, Python and the usual tools, the CA certificates that the host's administrator
    /// added, and an ordinary user `dev`.
    Full,
    /// Only the packages of every image.
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

    /// Returns the name of the profile in the arguments of `build.sh`.
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
    /// True if only the owner may use the image.
    pub private: bool,
}

/// Builds an image and publishes it. `progress` receives the stage, the number of stages done, and
/// their total. If the build fails or `admit` refuses the image, nothing is left behind.
///
/// # Errors
/// Those of `admit`, `name_taken`, `invalid_argument` (package names), `command_missing`,
/// `unsupported` (no subordinate ids or no sources for this distribution), `denied` (no
/// namespaces), `command_failed` with mmdebstrap's own error lines, `disk_full`, `cancelled`.
pub fn build(
    images: &Images,
    commands: &dyn Commands,
    spec: &BuildSpec,
    admit: &mut Admit<'_>,
    cancel: &Cancel,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<ImageInfo> {
    crate::locks::may_block("file access");
    let mut report = |stage: usize| progress(STAGES[stage].0, stage as u64, STAGES.len() as u64);
    let doing = |e: Error| e.context(format!("build image {}", spec.name));
    report(0);
    let packages = package_list(spec.profile, &spec.include)?;
    let staging = images.stage(&spec.name)?;
    let host = Host::this();
    host.ready(commands, cancel).map_err(doing)?;
    let init = super::init_script(include_str!("guest/init"));
    let inputs: Vec<Input<'_>> = INPUTS
        .into_iter()
        .chain([("init", init.as_str())])
        .map(|(name, text)| Input {
            name,
            bytes: text.as_bytes(),
        })
        .collect();
    let suite = write_inputs(staging.path(), &inputs, commands, cancel).map_err(doing)?;
    let args = [
        suite,
        packages.join(","),
        spec.disk_bytes.to_string(),
        TREE_BYTES_MAX.to_string(),
        spec.profile.word().to_owned(),
    ];
    let command = script_command(host.is_root(), staging.path(), "build.sh", args);
    run_script(commands, &command, &STAGES, cancel, &mut report).map_err(doing)?;

    report(STAGE_INITRAMFS);
    let out = staging.path().join("out");
    let mut metadata = Metadata::new(&spec.name, &packages, now_s());
    metadata.owner_uid = Some(spec.owner_uid);
    metadata.private = spec.private;
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
    admit(DiskUse::of_directory(&out)?).map_err(doing)?;
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
            // apt reads a trailing `+` or `-` as a request to install or remove the package.
            && !name.ends_with(['+', '-']);
        // `g++` is the one package whose own name ends so.
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

#[cfg(test)]
mod tests {
    use super::super::script::stage_of;
    use super::*;
    use crate::error::Kind;
    use crate::host::Command;
    use expect_test::{Expect, expect};
    use std::path::Path;

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
        let stage = Path::new("/s/images/.building-a-1");
        check(
            &script_command(false, stage, "build.sh", ["bookworm", "git,make"]),
            expect![
                "setpriv --pdeathsig KILL unshare --user --map-root-user --map-auto --mount --propagation private --pid --fork \
                 --kill-child sh /s/images/.building-a-1/in/build.sh /s/images/.building-a-1 bookworm git,make"
            ],
        );
        check(
            &script_command(true, stage, "build.sh", ["trixie"]),
            expect![
                "setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork --kill-child sh \
                 /s/images/.building-a-1/in/build.sh /s/images/.building-a-1 trixie"
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
    fn certificates_of_host_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let [script, from, to, outside] =
            ["certificates.sh", "from", "to", "outside"].map(|name| dir.path().join(name));
        std::fs::write(&script, include_str!("certificates.sh")).unwrap();
        let copy = || {
            let command = Command::new("sh").args([&script, &from, &to]);
            let cancel = Cancel::try_new().unwrap();
            let ran = crate::host::command::run_any_status(&command, &cancel, &mut |_| {}).unwrap();
            assert_eq!(ran.status, 0);
        };
        copy();
        assert!(!to.exists());

        std::fs::create_dir_all(from.join("company")).unwrap();
        for name in ["a.crt", "company/b c.crt", "notes.txt"] {
            std::fs::write(from.join(name), name).unwrap();
        }
        std::fs::write(&outside, "linked").unwrap();
        std::os::unix::fs::symlink(&outside, from.join("linked.crt")).unwrap();
        copy();
        for (name, content) in [
            ("a.crt", "a.crt"),
            ("company/b c.crt", "company/b c.crt"),
            ("linked.crt", "linked"),
        ] {
            let path = to.join(name);
            assert!(path.symlink_metadata().unwrap().is_file(), "{name}");
            assert_eq!(std::fs::read_to_string(path).unwrap(), content);
        }
        assert!(!to.join("notes.txt").exists());
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
        assert_eq!(
            stage_of(&STAGES, "I: downloading packages with apt..."),
            Some(2)
        );
        assert_eq!(stage_of(&STAGES, "anything"), None);
    }
}
