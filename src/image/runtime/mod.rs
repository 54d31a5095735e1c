//! Guest runtimes, which contain everything that an image with only its own files needs to boot.
//!
//! A runtime is a directory `<state>/runtimes/<id>` with a kernel, an initramfs, and the read-only
//! disk `runtime.ext4`, which guests mount at `/.fcd`: fcd's init, sshd, git, tar and other
//! programs of the distribution with their own libraries, and the kernel's modules. The id is a
//! digest of the content, so the same packages produce the same runtime. It is published with one
//! rename. Afterwards only the time of its build changes, if the same runtime is built again.
//!
//! A guest's block devices are its root disk (`/dev/vda`), the seed drive (`/dev/vdb`), the runtime
//! (`/dev/vdc`) and the work disk (`/dev/vdd`). The kernel argument [`BOOT_ARG`] tells the
//! initramfs to start the runtime's init.
//!
//! [`GuestRuntimes`] is the registry. [`ensure`] builds a runtime from packages like an image.

mod build;
mod updates;

#[cfg(feature = "fakes")]
pub use build::own_digest;
pub use build::{ensure, fresh};

use super::directory::{self, Readers, Staging, open_registry};
use super::registry::{FileRecord, INITRD, KERNEL};
use super::stamps;
use crate::api::daemon::Check;
use crate::error::{Error, Kind, Result};
use crate::host::plural::count;
use crate::host::{Commands, hex};
use crate::ids::{ID_LEN, RuntimeId};
use crate::locks::Cancel;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The kernel argument of a guest that boots with a runtime; see `guest/initrd-init`.
pub const BOOT_ARG: &str = "fcd.runtime";
/// The kernel arguments of a guest that runs its image's init. systemd must not ask for a password
/// and a time zone on the console or wait for a login there, because the console has no input. It
/// must not wait for networkd, which does not manage `eth0`.
pub const SYSTEMD_ARGS: [&str; 3] = [
    "systemd.firstboot=no",
    "systemd.mask=serial-getty@ttyS0.service",
    "systemd.mask=systemd-networkd-wait-online.service",
];
const RUNTIMES_DIR: &str = "runtimes";
const STAGING_PREFIX: &str = ".building-";
const DISK: &str = "runtime.ext4";
const METADATA: &str = "runtime.json";
const METADATA_BYTES_MAX: u64 = 256 << 10;

/// The content of `runtime.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RuntimeInfo {
    pub id: RuntimeId,
    /// The kernel's version, for example `6.1.0-56-cloud-amd64`.
    pub kernel_version: String,
    /// The packages whose files are in the runtime, sorted by name.
    pub packages: Vec<Package>,
    /// When the runtime was built, in seconds since the epoch.
    pub built_at: u64,
    /// The digest of the files that come from fcd itself. It differs from [`own_digest`] if another
    /// version of fcd built the runtime.
    pub own_digest: String,
    files: Vec<FileRecord>,
    /// The space that the runtime uses on the host.
    #[serde(skip)]
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    pub name: String,
    pub version: String,
}

impl RuntimeInfo {
    /// Returns the time since the runtime was built, in whole days.
    fn age_days(&self, now_s: u64) -> u64 {
        now_s.saturating_sub(self.built_at) / (24 * 60 * 60)
    }
}

/// The paths of a runtime's files, which are absolute if the registry's path is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeFiles {
    /// An ELF file that boots through PVH.
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub disk: PathBuf,
}

/// The registry of guest runtimes. It keeps nothing in memory.
#[derive(Clone, Debug)]
pub struct GuestRuntimes {
    dir: PathBuf,
}

impl GuestRuntimes {
    /// Opens `<state_dir>/runtimes`, which is created if it does not exist, and removes the
    /// leftovers of unfinished builds and deletions.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let dir = open_registry(state_dir, RUNTIMES_DIR, STAGING_PREFIX)?;
        Ok(Self { dir })
    }

    /// Returns the paths of a runtime's files. Does not check that they exist.
    pub fn files(&self, id: &RuntimeId) -> RuntimeFiles {
        let dir = self.dir.join(id.as_str());
        RuntimeFiles {
            kernel: dir.join(KERNEL),
            initrd: dir.join(INITRD),
            disk: dir.join(DISK),
        }
    }

    /// Reads the information about a runtime.
    ///
    /// # Errors
    /// `image_not_found`, or `host` if the runtime is damaged, for example because a file is
    /// missing or was written to.
    pub fn get(&self, id: &RuntimeId) -> Result<RuntimeInfo> {
        crate::locks::may_block("file access");
        let dir = self.dir.join(id.as_str());
        let damaged = |what: String| {
            let text = format!("guest runtime {id} is damaged: {what}");
            Error::new(Kind::Host, text)
                .hint(format!("move {} away, then {BUILD_HINT}", dir.display()))
        };
        let file = match File::open(dir.join(METADATA)) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !dir.exists() => {
                let text = format!("there is no guest runtime {id}");
                return Err(Error::new(Kind::ImageNotFound, text).hint(BUILD_HINT));
            }
            Err(e) => return Err(damaged(format!("{METADATA}: {e}"))),
        };
        let bytes = crate::host::command::read_bounded(file, METADATA_BYTES_MAX)
            .map_err(|e| damaged(e.to_string()))?;
        let mut info: RuntimeInfo =
            serde_json::from_slice(&bytes).map_err(|e| damaged(format!("{METADATA}: {e}")))?;
        if info.id != *id {
            return Err(damaged(format!("{METADATA} belongs to another runtime")));
        }
        stamps::require_unchanged(&dir).map_err(damaged)?;
        for name in FILES {
            let record = info.files.iter().find(|f| f.name == name);
            let record =
                record.ok_or_else(|| damaged(format!("{METADATA} does not name {name}")))?;
            let found =
                std::fs::metadata(dir.join(name)).map_err(|e| damaged(format!("{name}: {e}")))?;
            if found.len() != record.bytes {
                return Err(damaged(format!(
                    "{name} has {} bytes instead of {}",
                    found.len(),
                    record.bytes
                )));
            }
            info.bytes += found.blocks() * 512;
        }
        Ok(info)
    }

    /// Returns all runtimes, the newest first. Damaged ones are logged and omitted.
    pub fn list(&self) -> Result<Vec<RuntimeInfo>> {
        crate::locks::may_block("file access");
        let entries =
            std::fs::read_dir(&self.dir).map_err(|e| Error::io("read the guest runtimes", e))?;
        let ids = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse::<RuntimeId>().ok());
        let mut all: Vec<RuntimeInfo> = ids
            .filter_map(|id| self.get(&id).inspect_err(|e| log::warn!("{e}")).ok())
            .collect();
        all.sort_by(|a, b| (b.built_at, &b.id).cmp(&(a.built_at, &a.id)));
        Ok(all)
    }

    /// Returns the newest runtime.
    ///
    /// # Errors
    /// `image_not_found` with the command that builds one.
    pub fn newest(&self) -> Result<RuntimeInfo> {
        self.list()?.into_iter().next().ok_or_else(|| {
            let text = "no guest runtime has been built, and the image has no kernel and no init of its own";
            Error::new(Kind::ImageNotFound, text).hint(BUILD_HINT)
        })
    }

    /// Reports the newest runtime, its age and its updates for `doctor`. Runs short commands.
    pub fn check(&self, now_s: u64, commands: &dyn Commands, cancel: &Cancel) -> Check {
        const ID: &str = "guest-runtime";
        let Ok(info) = self.newest() else {
            return Check::ok(ID, "no guest runtime has been built yet");
        };
        let (id, days) = (&info.id, info.age_days(now_s));
        let text = format!(
            "guest runtime {id}: kernel {}, built {} ago",
            info.kernel_version,
            count(days, "day")
        );
        let updates = updates::updates(&info, commands, cancel);
        let missing = match updates.len() as u64 {
            0 if days < OLD_DAYS => return Check::ok(ID, text),
            0 => "its packages may lack security updates".to_owned(),
            n => format!("updates for {}: {}", count(n, "package"), updates.join(" ")),
        };
        Check::warn(ID, format!("{text}; {missing}"), BUILD_HINT)
    }

    /// Deletes a runtime, even a damaged one. Snapshots are not affected, because they have hard
    /// links to its files. The caller checks that no VM uses it.
    pub fn delete(&self, id: &RuntimeId) -> Result<()> {
        if directory::delete(&self.dir, id.as_str())? {
            return Ok(());
        }
        self.get(id).map(drop)
    }

    fn stage(&self) -> Result<Staging> {
        Staging::new(&self.dir, STAGING_PREFIX)
    }

    /// Publishes `files`, a directory below the staging directory. If the runtime exists already,
    /// only its time of build is updated.
    fn publish(&self, files: &Path, info: &RuntimeInfo) -> Result<RuntimeInfo> {
        crate::locks::may_block("file access");
        let io = |e: std::io::Error| Error::io(format!("publish guest runtime {}", info.id), e);
        let text = serde_json::to_vec_pretty(info).map_err(|e| io(e.into()))?;
        std::fs::write(files.join(METADATA), &text).map_err(io)?;
        let to = self.dir.join(info.id.as_str());
        let mut names = FILES.to_vec();
        names.push(METADATA);
        if !directory::publish(files, &names, Readers::Everybody, &to).map_err(io)? {
            self.get(&info.id)?;
            // The packages were current at this build, so the runtime's age counts from now.
            std::fs::rename(files.join(METADATA), to.join(METADATA)).map_err(io)?;
            crate::host::fs::sync_dir(&to)?;
        }
        self.get(&info.id)
    }
}

/// The age from which `doctor` warns.
const OLD_DAYS: u64 = 30;
/// The files of a runtime, apart from `runtime.json`.
const FILES: [&str; 3] = [DISK, KERNEL, INITRD];
const BUILD_HINT: &str = "run fcctl image build NAME with a new name, which also builds a runtime";

/// Returns the id of a runtime with this content: the digests of the tree on its disk, of its
/// kernel and of its initramfs.
fn id_of(digests: [&str; 3]) -> RuntimeId {
    let mut hash = Sha256::new();
    for digest in digests {
        hash.update(format!("{digest}\n"));
    }
    let mut id = hex::encode(&hash.finalize());
    id.truncate(ID_LEN);
    id.parse().expect("hexadecimal digits")
}

#[cfg(test)]
mod tests {
    use super::*;

    impl RuntimeInfo {
        pub(super) fn for_test() -> Self {
            Self {
                id: id_of(["t", "k", "i"]),
                kernel_version: "6.1".into(),
                packages: vec![],
                built_at: 7,
                own_digest: String::new(),
                files: vec![],
                bytes: 0,
            }
        }
    }

    fn publish(runtimes: &GuestRuntimes, text: &str, built_at: u64) -> Result<RuntimeInfo> {
        let staging = runtimes.stage()?;
        let out = staging.path().join("out");
        std::fs::create_dir(&out).unwrap();
        let files = FILES
            .map(|name| {
                std::fs::write(out.join(name), text).unwrap();
                FileRecord {
                    name: name.to_owned(),
                    bytes: text.len() as u64,
                    sha256: String::new(),
                }
            })
            .to_vec();
        let info = RuntimeInfo {
            id: id_of([text, "k", "i"]),
            built_at,
            files,
            ..RuntimeInfo::for_test()
        };
        runtimes.publish(&out, &info)
    }

    #[test]
    fn newest_runtime_is_the_last_one_built() {
        let state = tempfile::tempdir().unwrap();
        let runtimes = GuestRuntimes::open(state.path()).unwrap();
        let e = runtimes.newest().unwrap_err();
        assert_eq!(
            (e.kind(), e.hint_text()),
            (Kind::ImageNotFound, Some(BUILD_HINT))
        );
        let old = publish(&runtimes, "old", 7).unwrap();
        let new = publish(&runtimes, "new", 8).unwrap();
        assert_eq!(runtimes.newest().unwrap(), new);
        assert_eq!(publish(&runtimes, "old", 9).unwrap().built_at, 9);
        assert_eq!(runtimes.newest().unwrap().id, old.id);
        runtimes.delete(&old.id).unwrap();
        assert_eq!(
            runtimes.delete(&old.id).unwrap_err().kind(),
            Kind::ImageNotFound
        );
        assert_eq!(runtimes.list().unwrap(), [new]);
    }

    #[test]
    fn doctor_warns_about_an_old_runtime() {
        use crate::api::daemon::Severity;
        let state = tempfile::tempdir().unwrap();
        let runtimes = GuestRuntimes::open(state.path()).unwrap();
        let check = |days: u64| {
            let (host, cancel) = (crate::host::HostCommands, Cancel::try_new().unwrap());
            let check = runtimes.check(7 + days * 24 * 60 * 60, &host, &cancel);
            (check.severity, check.found)
        };
        assert_eq!(check(0).0, Severity::Ok);
        let id = publish(&runtimes, "text", 7).unwrap().id;
        let (severity, found) = check(1);
        assert_eq!(severity, Severity::Ok);
        assert_eq!(
            found,
            format!("guest runtime {id}: kernel 6.1, built 1 day ago")
        );
        assert_eq!(check(OLD_DAYS).0, Severity::Warn);
    }

    #[test]
    fn damaged_runtime_is_not_used() {
        let state = tempfile::tempdir().unwrap();
        let runtimes = GuestRuntimes::open(state.path()).unwrap();
        let info = publish(&runtimes, "text", 7).unwrap();
        std::fs::remove_file(runtimes.files(&info.id).disk).unwrap();
        assert_eq!(runtimes.get(&info.id).unwrap_err().kind(), Kind::Host);
        assert!(runtimes.newest().is_err());
        runtimes.delete(&info.id).unwrap();
    }

    #[test]
    fn id_depends_on_every_digest() {
        let id = id_of(["a", "b", "c"]);
        assert_eq!(id, id_of(["a", "b", "c"]));
        for other in [
            ["x", "b", "c"],
            ["a", "x", "c"],
            ["a", "b", "x"],
            ["ab", "", "c"],
        ] {
            assert_ne!(id, id_of(other));
        }
    }
}
