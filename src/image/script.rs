//! Runs the scripts that build an image or a guest runtime from the distribution's packages. They
//! need root, so they run in namespaces, and in a user namespace if the daemon is not root.

use super::checks::{namespace, source_files};
use super::{apt_texts, kernel, sources};
use crate::error::{Error, Kind, Result};
use crate::host::text::printable;
use crate::host::{Command, Commands, Complaint, strerror};
use crate::locks::Cancel;
use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

const BUILD_DEADLINE: Duration = Duration::from_secs(30 * 60);
/// The number of error lines of a failed build that are shown.
const ERROR_LINES_MAX: usize = 3;

/// A stage of a build: its name for users, and the line of the script's output with which it
/// begins, or an empty text if the stage is not part of the script.
pub(super) type Stage = (&'static str, &'static str);

/// A file that the script reads from the directory `in`.
pub(super) struct Input<'a> {
    pub name: &'a str,
    pub bytes: &'a [u8],
}

/// Fills the directory `in` with `inputs` and apt's settings, creates `work` and `out`, and returns
/// the suite.
pub(super) fn write_inputs(
    stage: &Path,
    inputs: &[Input<'_>],
    commands: &dyn Commands,
    cancel: &Cancel,
) -> Result<String> {
    crate::locks::may_block("file access");
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
    let settings =
        [("sources.list", sources.as_str()), ("apt.conf", &conf)].map(|(name, text)| Input {
            name,
            bytes: text.as_bytes(),
        });
    for input in inputs.iter().chain(&settings) {
        std::fs::write(stage.join("in").join(input.name), input.bytes).map_err(io)?;
    }
    Ok(os.codename)
}

/// Returns the command that runs the input `script` with the stage's directory and `args`.
pub(super) fn script_command<I: IntoIterator<Item: AsRef<OsStr>>>(
    root: bool,
    stage: &Path,
    script: &str,
    args: I,
) -> Command {
    let mut command = namespace(root)
        .arg("sh")
        .arg(stage.join("in").join(script))
        .arg(stage)
        .args(args)
        .deadline(BUILD_DEADLINE);
    for key in ["http_proxy", "https_proxy", "no_proxy"] {
        if let Some(value) = std::env::var_os(key) {
            command = command.env(key, value);
        }
    }
    command
}

/// Runs a script and reports the number of each stage as it begins.
pub(super) fn run_script(
    commands: &dyn Commands,
    command: &Command,
    stages: &[Stage],
    cancel: &Cancel,
    report: &mut dyn FnMut(usize),
) -> Result<()> {
    let mut errors: Vec<String> = Vec::new();
    let ran = commands.run(command, cancel, &mut |line| {
        log::debug!("image build: {}", printable(line));
        if let Some(stage) = stage_of(stages, line) {
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

pub(super) fn stage_of(stages: &[Stage], line: &str) -> Option<usize> {
    stages
        .iter()
        .position(|(_, mark)| !mark.is_empty() && line.starts_with(mark))
}

/// Reads a file of one line that the script has written.
pub(super) fn read_line(dir: &Path, name: &str) -> Result<String> {
    crate::locks::may_block("file access");
    let text = std::fs::read_to_string(dir.join(name))
        .map_err(|e| Error::io(format!("read {name}"), e))?;
    Ok(text.trim().to_owned())
}

/// Unpacks `vmlinuz` to `vmlinux`.
pub(super) fn unpack_kernel(commands: &dyn Commands, out: &Path, cancel: &Cancel) -> Result<()> {
    crate::locks::may_block("file access");
    let image =
        std::fs::read(out.join("vmlinuz")).map_err(|e| Error::io("read the kernel image", e))?;
    super::unpack::unpack(commands, &kernel::payload(&image)?, out, cancel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Output;

    const STAGES: [Stage; 2] = [
        ("check", ""),
        ("extract packages", "I: extracting archives"),
    ];

    struct Fails(&'static [&'static str]);

    impl Commands for Fails {
        fn run(&self, _: &Command, _: &Cancel, on_line: &mut dyn FnMut(&str)) -> Result<Output> {
            self.0.iter().for_each(|l| on_line(l));
            Err(
                Error::new(Kind::CommandFailed, "setpriv failed with status 1")
                    .with_source(Complaint("bye".to_owned())),
            )
        }
    }

    #[test]
    fn failed_build_shows_its_error_lines() {
        let run = |lines| {
            let mut seen = Vec::new();
            let cancel = Cancel::try_new().unwrap();
            let command = Command::new("x");
            let e = run_script(&Fails(lines), &command, &STAGES, &cancel, &mut |s| {
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
        assert_eq!((kind, seen), (Kind::CommandFailed, vec![1]));
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
