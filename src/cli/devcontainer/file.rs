//! Finds and reads the `devcontainer.json` of a project. The repository may be hostile, so links
//! that lead out of the project are not followed, and only a regular file of a bounded size is
//! read.

use crate::error::{Error, Kind, Result};
use crate::host::command::read_bounded;
use crate::host::hex;
use crate::ids::{LabelKey, LabelValue};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The possible paths of the file in a project. The first one that exists is used.
const PLACES: [&str; 2] = [".devcontainer/devcontainer.json", ".devcontainer.json"];
/// The key of the label that holds the directory of a VM.
const LABEL: &str = "fcd.directory";
/// Largest file that is read into memory.
const BYTES_MAX: u64 = 1 << 20;
/// How many hexadecimal digits of the hash of a directory are part of a VM's name.
const NAME_HASH_LEN: usize = 8;
/// How many characters of the directory's name are part of a VM's name. With a dash and the hash,
/// the name is not longer than [`crate::ids::NAME_LEN_MAX`].
const NAME_WORD_LEN_MAX: usize = 20;

/// A directory with a VM of its own.
#[derive(Debug)]
pub(super) struct Project {
    /// The directory with the file, or else the top of the repository.
    pub dir: PathBuf,
    pub file: Option<ProjectFile>,
}

#[derive(Debug)]
pub(super) struct ProjectFile {
    pub path: PathBuf,
    pub text: String,
}

impl ProjectFile {
    /// Returns the hash of the content, under which the user's consent is recorded.
    pub(super) fn hash(&self) -> String {
        hex::encode(&Sha256::digest(self.text.as_bytes()))
    }
}

impl Project {
    /// Finds the project of a directory: the nearest directory with the file, up to `top`, which is
    /// the top of its repository.
    pub(super) fn find(path: &Path, top: &Path) -> Result<Self> {
        let real =
            std::fs::canonicalize(path).map_err(|e| Error::io(path.display().to_string(), e))?;
        for dir in real.ancestors() {
            if let Some(file) = read(dir)? {
                return Ok(Self {
                    dir: dir.to_owned(),
                    file: Some(file),
                });
            }
            if dir == top {
                break;
            }
        }
        Ok(Self {
            dir: top.to_owned(),
            file: None,
        })
    }

    /// Returns the value of the label by which later calls find the VM: the directory, or its hash
    /// if the directory is not a valid value.
    pub(super) fn label(&self) -> LabelValue {
        let path = self.dir.to_str().and_then(|path| path.parse().ok());
        path.unwrap_or_else(|| {
            let hash = hex::encode(&Sha256::digest(self.dir.as_os_str().as_bytes()));
            let text = format!("sha256:{hash}");
            text.parse().expect("a hash is a valid label value")
        })
    }

    /// Returns the name to try first for a new VM. It depends only on the user and the directory.
    pub(super) fn vm_name(&self, uid: u32) -> String {
        vm_name(&self.dir, uid)
    }
}

/// Returns the key of the label that holds the directory.
pub(super) fn label_key() -> LabelKey {
    LABEL.parse().expect("the key of a label")
}

fn vm_name(dir: &Path, uid: u32) -> String {
    let base = dir.file_name().unwrap_or_default().to_string_lossy();
    let word: String = base
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let word = word.trim_start_matches(|c: char| !c.is_ascii_lowercase());
    let word = word[..word.len().min(NAME_WORD_LEN_MAX)].trim_end_matches('-');
    let word = if word.is_empty() { "dev" } else { word };
    let key = [
        uid.to_string().as_bytes(),
        b"\0",
        dir.as_os_str().as_bytes(),
    ]
    .concat();
    let hash = hex::encode(&Sha256::digest(key));
    format!("{word}-{}", &hash[..NAME_HASH_LEN])
}

/// Reads the file of a directory, if there is one.
fn read(dir: &Path) -> Result<Option<ProjectFile>> {
    for place in PLACES {
        let path = dir.join(place);
        let doing = || format!("read {}", path.display());
        let Some(file) =
            open(dir, place).map_err(|e| Error::io(doing(), std::io::Error::from(e)))?
        else {
            continue;
        };
        let meta = file.metadata().map_err(|e| Error::io(doing(), e))?;
        if !meta.is_file() {
            return Err(invalid(doing() + ": it is not a regular file"));
        }
        let bytes = read_bounded(file, BYTES_MAX + 1).map_err(|e| Error::io(doing(), e))?;
        if bytes.len() as u64 > BYTES_MAX {
            let text = format!("{}: it has more than {BYTES_MAX} bytes", doing());
            return Err(invalid(text));
        }
        let text = String::from_utf8(bytes).map_err(|_| invalid(doing() + ": it is not UTF-8"))?;
        return Ok(Some(ProjectFile { path, text }));
    }
    Ok(None)
}

fn invalid(text: String) -> Error {
    Error::new(Kind::InvalidArgument, text)
}

/// Opens a file below the directory. A FIFO does not block.
fn open(dir: &Path, place: &str) -> rustix::io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let root = rustix::fs::open(
        dir,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(&root, place, flags, Mode::empty(), resolve) {
            Ok(fd) => return Ok(Some(fd.into())),
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: PathBuf, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn nearest_file_up_to_the_top_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        let find = |path: &str| {
            let project = Project::find(&top.join(path), &top).unwrap();
            let dir = project.dir.strip_prefix(&top).unwrap().to_owned();
            (
                dir.display().to_string(),
                project.file.map(|file| file.text),
            )
        };
        let found = |dir: &str, text: &str| (dir.to_owned(), Some(text.to_owned()));
        assert_eq!(find("a/b"), (String::new(), None));
        write(top.join(".devcontainer.json"), "short");
        assert_eq!(find("a/b"), found("", "short"));
        write(top.join(".devcontainer/devcontainer.json"), "top");
        assert_eq!(find("a/b"), found("", "top"));
        write(top.join("a/.devcontainer/devcontainer.json"), "a");
        assert_eq!(find("a/b"), found("a", "a"));
        assert_eq!(find(""), found("", "top"));
    }

    #[test]
    fn only_regular_files_in_the_project_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let project = top.join("project");
        let place = project.join(".devcontainer.json");
        std::fs::create_dir(&project).unwrap();
        write(top.join("secret"), "secret");
        let refusal = || {
            let e = Project::find(&project, &project).unwrap_err().to_string();
            std::fs::remove_file(&place).unwrap();
            e
        };
        std::os::unix::fs::symlink(top.join("secret"), &place).unwrap();
        assert!(refusal().contains("Invalid cross-device link"));
        nix::unistd::mkfifo(&place, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(refusal().contains("it is not a regular file"));
        std::os::unix::fs::symlink("/dev/zero", &place).unwrap();
        assert!(!refusal().is_empty());
        std::fs::write(&place, vec![b' '; BYTES_MAX as usize + 1]).unwrap();
        assert!(refusal().contains("more than 1048576 bytes"));
        std::fs::write(&place, b"\xff").unwrap();
        assert!(refusal().contains("it is not UTF-8"));
        write(project.join("config"), "linked");
        std::os::unix::fs::symlink("config", &place).unwrap();
        let found = Project::find(&project, &project).unwrap();
        assert_eq!(found.file.unwrap().text, "linked");
    }

    #[test]
    fn label_has_the_directory_or_its_hash() {
        let label = |dir: &str| {
            let project = Project {
                dir: dir.into(),
                file: None,
            };
            project.label().to_string()
        };
        assert_eq!(label("/home/me/My App"), "/home/me/My App");
        assert!(label("/a\nb").starts_with("sha256:"));
        assert!(label(&"/a".repeat(600)).starts_with("sha256:"));
        assert_eq!(label_key().as_str(), LABEL);
    }

    #[test]
    fn vm_name_is_valid_and_different_for_users_and_directories() {
        let name = |dir: &str, uid| {
            let name = vm_name(Path::new(dir), uid);
            name.parse::<crate::ids::VmName>().expect(&name);
            name
        };
        assert!(name("/home/me/My Project!", 0).starts_with("my-project-"));
        assert!(name("/", 0).starts_with("dev-"));
        assert!(name("/x/1-2-3", 0).starts_with("dev-"));
        assert!(name("/x/éa", 0).starts_with("a-"));
        assert_eq!(name(&"/a".repeat(300), 0), name(&"/a".repeat(300), 0));
        assert_eq!(name("/x/a-long-name-of-a-directory-b", 0).len(), 29);
        assert_ne!(name("/a/app", 0), name("/b/app", 0));
        assert_ne!(name("/a/app", 0), name("/a/app", 1));
    }
}
