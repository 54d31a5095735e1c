//! Claims of root's daemons on the host: a range of uids for VMs and, with a bridge, a subnet.
//! Without claims, two daemons would give their VMs the same uids, and a VMM of one daemon could
//! reach files of the other. So each daemon claims its uids and subnet before it creates anything.
//!
//! A claim is a file in [`DIR`], which a reboot empties. A running daemon holds an flock(2) on its
//! claim. VMs outlive their daemon, so the claim of a daemon that has exited stays valid as long as
//! VMs of its installation run. The file is kept even longer, because it maps the installation's id
//! to its state directory. [`Registry`] uses this to find installations that were removed.

use crate::config::{Network, Qemu, Subnet};
use crate::daemon::gone::{GoneInstallation, Installations};
use crate::error::{Error, Kind, Result};
use crate::host::hex;
use crate::host::process::find_by_prefix;
use crate::ids::Tag;
use crate::sched::Instant;
use rustix::fs::{FlockOperation, OFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The directory of the claims.
pub(super) const DIR: &str = "/run/fcd-claims";
/// The file whose lock is held while claims are compared, for a few milliseconds.
const LOCK_FILE: &str = "lock";
const LOCK_DEADLINE: Duration = Duration::from_secs(10);
const LOCK_PERIOD: Duration = Duration::from_millis(20);
const CLAIM_BYTES_MAX: u64 = 64 * 1024;
/// How many former installations of one state directory are remembered. The oldest is forgotten
/// first.
const FORMER_MAX: usize = 64;

/// The content of a claim's file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Claim {
    state_dir: PathBuf,
    pid: u32,
    uid_base: u32,
    uid_count: u32,
    /// The subnet, if there is a bridge. It is claimed only in the network namespace `netns`.
    subnet: Option<String>,
    netns: PathBuf,
    /// The installation's id, as in the tags of its VMs. None until something is created.
    install_id: Option<String>,
    /// The ids of installations that used this state directory before and may have left something
    /// on the host.
    #[serde(default)]
    former: Vec<String>,
}

/// The daemon's own claim. It is valid while this value exists, and afterwards as long as VMs run.
pub(super) struct Held {
    dir: PathBuf,
    /// Holds the lock of the claim.
    file: File,
    claim: Claim,
}

impl Claim {
    fn new(state_dir: &Path, qemu: &Qemu, network: &Network) -> Result<Self> {
        crate::locks::may_block("file access");
        const NETNS: &str = "/proc/self/ns/net";
        let netns = std::fs::read_link(NETNS).map_err(|e| Error::io(format!("read {NETNS}"), e))?;
        Ok(Self {
            state_dir: state_dir.to_owned(),
            pid: std::process::id(),
            uid_base: qemu.uid_base,
            uid_count: qemu.uid_count,
            subnet: network.is_bridge().then(|| network.subnet.to_string()),
            netns,
            install_id: None,
            former: Vec::new(),
        })
    }

    /// Records the installations of an earlier claim of the same state directory as former
    /// installations.
    fn inherit(&mut self, earlier: Claim) {
        self.former = earlier.former;
        self.former.extend(earlier.install_id);
    }

    /// Sets the installation that uses the state directory now, and forgets the oldest former
    /// installations if there are too many.
    fn become_installation(&mut self, id: &str) {
        self.install_id = Some(id.to_owned());
        self.former.retain(|former| former != id);
        self.former.dedup();
        self.former
            .drain(..self.former.len().saturating_sub(FORMER_MAX));
    }

    /// Returns the name of the claim's file, which depends only on the state directory.
    fn file_name(&self) -> String {
        let hash = Sha256::digest(self.state_dir.as_os_str().as_encoded_bytes());
        format!("{}.json", hex::encode(&hash[..8]))
    }

    fn shares_uids(&self, other: &Self) -> bool {
        let end = |claim: &Self| claim.uid_base.saturating_add(claim.uid_count);
        self.uid_base < end(other) && other.uid_base < end(self)
    }

    fn shares_subnet(&self, other: &Self) -> bool {
        let subnet = |claim: &Self| claim.subnet.as_ref().and_then(|s| s.parse::<Subnet>().ok());
        match (subnet(self), subnet(other)) {
            (Some(a), Some(b)) => self.netns == other.netns && a.overlaps(b.base(), b.prefix()),
            _ => false,
        }
    }

    fn conflict(&self, other: &Self) -> Option<Error> {
        let uids = format!(
            "uids {} to {}",
            other.uid_base,
            other.uid_base.saturating_add(other.uid_count) - 1
        );
        let subnet = other.subnet.clone().unwrap_or_default();
        let set_uids = "other uids for VMs: uid_base = ... and uid_count = ... under [qemu]";
        let set_subnet = "another subnet: subnet = ... under [network]";
        let (what, set) = match (self.shares_uids(other), self.shares_subnet(other)) {
            (false, false) => return None,
            (true, false) => (uids, set_uids.to_owned()),
            (false, true) => (format!("subnet {subnet}"), set_subnet.to_owned()),
            (true, true) => (
                format!("{uids} and subnet {subnet}"),
                format!("{set_uids}, and {set_subnet}"),
            ),
        };
        let whose = format!(
            "another fcd (process {}, state directory {})",
            other.pid,
            other.state_dir.display()
        );
        let text = format!("claim uids and subnet for VMs: {whose} or its VMs use {what}");
        Some(
            Error::new(Kind::Conflict, text)
                .hint(format!("stop that daemon and its VMs, or set {set}")),
        )
    }
}

/// Claims the configured uids and subnet for a state directory. The claims are files in `dir`.
///
/// # Errors
/// `conflict` if another installation has some of them (the hint names the setting to change),
/// `busy` if another process holds a lock for too long, or `host`.
pub(super) fn take(state_dir: &Path, qemu: &Qemu, network: &Network, dir: &Path) -> Result<Held> {
    crate::locks::may_block("file access");
    drop(crate::host::fs::create_dir(dir, 0o700)?);
    let mut claim = Claim::new(state_dir, qemu, network)?;
    let _lock = lock(dir)?;
    let own = claim.file_name();
    let entries =
        std::fs::read_dir(dir).map_err(|e| Error::io(format!("read {}", dir.display()), e))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.as_encoded_bytes().ends_with(b".json") && name != *own {
            check_conflict(&claim, &entry.path())?;
        }
    }
    let path = dir.join(own);
    let file = open(&path)?;
    // A child of the previous daemon may hold the lock until its exec.
    flock(&file, &path)?;
    if let Some(earlier) = read(&file, &path)? {
        claim.inherit(earlier);
    }
    write(&file, &claim)?;
    Ok(Held {
        dir: dir.to_owned(),
        file,
        claim,
    })
}

/// Fails if a valid claim in the file at `path` conflicts with `claim`.
fn check_conflict(claim: &Claim, path: &Path) -> Result<()> {
    let file = open(path)?;
    let is_held = is_held(&file);
    // An incomplete file was cut off while being written, before anything was created, so it claims
    // nothing.
    let Some(other) = read(&file, path)? else {
        return Ok(());
    };
    let ids = other.install_id.iter().chain(&other.former);
    if is_held || has_vms(ids)? {
        claim.conflict(&other).map_or(Ok(()), Err)
    } else {
        Ok(())
    }
}

/// True if a daemon holds this claim. Otherwise no daemon can take the claim before `file` is
/// closed.
fn is_held(file: &File) -> bool {
    crate::locks::may_block("file access");
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_err()
}

fn read(mut file: &File, path: &Path) -> Result<Option<Claim>> {
    let mut text = String::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(CLAIM_BYTES_MAX).read_to_string(&mut text));
    read.map_err(|e| Error::io(format!("read {}", path.display()), e))?;
    Ok(serde_json::from_str(&text).ok())
}

fn write(mut file: &File, claim: &Claim) -> Result<()> {
    crate::locks::may_block("file access");
    let text =
        serde_json::to_vec(claim).map_err(|e| Error::internal("write a claim").with_source(e))?;
    let mut write = || {
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(&text)
    };
    write().map_err(|e| Error::io("write the claim of uids and subnet", e))
}

/// True if a VM of one of these installations runs.
fn has_vms<'a>(ids: impl IntoIterator<Item = &'a String>) -> Result<bool> {
    for id in ids {
        if !find_by_prefix(&Tag::prefix(id))?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Locks the directory, so that claims can be compared.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK_FILE);
    let lock = open(&path)?;
    flock(&lock, &path)?;
    Ok(lock)
}

/// All claims on this host, as seen by a daemon that has its own claim.
pub(super) struct Registry {
    dir: PathBuf,
    own: String,
    netns: PathBuf,
}

impl Registry {
    fn visit_own(&self, visit: &mut dyn FnMut(&GoneInstallation) -> bool) -> Result<()> {
        let path = self.dir.join(&self.own);
        let file = open(&path)?;
        let Some(mut claim) = read(&file, &path)? else {
            return Ok(());
        };
        // Until the claim names its installation, that installation may be one of the former
        // installations.
        if claim.install_id.is_none() {
            return Ok(());
        }
        let before = claim.former.len();
        self.visit_former(&mut claim, visit)?;
        if claim.former.len() == before {
            Ok(())
        } else {
            write(&file, &claim)
        }
    }

    /// Calls `visit` for former installations, and forgets the installations that have left
    /// nothing.
    fn visit_former(
        &self,
        claim: &mut Claim,
        visit: &mut dyn FnMut(&GoneInstallation) -> bool,
    ) -> Result<()> {
        for id in std::mem::take(&mut claim.former) {
            if has_vms([&id])? || !visit(&self.gone(claim, &id)) {
                claim.former.push(id);
            }
        }
        Ok(())
    }

    fn gone(&self, claim: &Claim, id: &str) -> GoneInstallation {
        // The former installation may have had a bridge even if the current configuration has none.
        GoneInstallation {
            install_id: id.to_owned(),
            state_dir: claim.state_dir.clone(),
            has_network: claim.netns == self.netns,
        }
    }

    fn visit_other(
        &self,
        path: &Path,
        visit: &mut dyn FnMut(&GoneInstallation) -> bool,
    ) -> Result<()> {
        crate::locks::may_block("file access");
        let file = open(path)?;
        if is_held(&file) {
            return Ok(());
        }
        let Some(mut claim) = read(&file, path)? else {
            return Ok(());
        };
        if !is_missing(&claim.state_dir) {
            return Ok(());
        }
        let before = claim.clone();
        claim.former.extend(claim.install_id.take());
        self.visit_former(&mut claim, visit)?;
        if claim.former.is_empty() && before.netns == self.netns {
            return std::fs::remove_file(path)
                .map_err(|e| Error::io(format!("remove {}", path.display()), e));
        }
        Ok(())
    }
}

/// True only if the directory certainly does not exist. A directory that cannot be accessed may
/// exist.
fn is_missing(dir: &Path) -> bool {
    crate::locks::may_block("file access");
    use std::io::ErrorKind::{NotADirectory, NotFound};
    std::fs::symlink_metadata(dir).is_err_and(|e| matches!(e.kind(), NotFound | NotADirectory))
}

impl Installations for Registry {
    /// Records the installation, so that the claim stays valid while its VMs run.
    fn set_own(&self, install_id: &str) -> Result<()> {
        let _lock = lock(&self.dir)?;
        let path = self.dir.join(&self.own);
        let file = open(&path)?;
        let mut claim = read(&file, &path)?.ok_or_else(|| {
            Error::internal(format!("read {}: the file is not a claim", path.display()))
        })?;
        claim.become_installation(install_id);
        write(&file, &claim)
    }

    /// Holds the lock during the visit, so no daemon can start with a claim of one of these
    /// installations.
    fn visit_gone(&self, visit: &mut dyn FnMut(&GoneInstallation) -> bool) -> Result<()> {
        crate::locks::may_block("file access");
        let _lock = lock(&self.dir)?;
        self.visit_own(visit)?;
        let entries = std::fs::read_dir(&self.dir)
            .map_err(|e| Error::io(format!("read {}", self.dir.display()), e))?;
        for name in entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
        {
            if name.ends_with(".json") && name != self.own {
                self.visit_other(&self.dir.join(&name), visit)?;
            }
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<File> {
    crate::locks::may_block("file access");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(path, flags, rustix::fs::Mode::from_raw_mode(0o600));
    fd.map(File::from)
        .map_err(|e| Error::io(format!("open {}", path.display()), e))
}

fn flock(file: &File, path: &Path) -> Result<()> {
    crate::locks::may_block("sleep");
    let deadline = Instant::now() + LOCK_DEADLINE;
    while rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() > deadline {
            return Err(Error::new(
                Kind::Busy,
                format!("lock {}: another process holds it", path.display()),
            )
            .hint(format!("find it with fuser -v {}", path.display())));
        }
        std::thread::sleep(LOCK_PERIOD);
    }
    Ok(())
}

impl Held {
    /// Returns the registry of claims. The daemon need not know its own installation yet.
    pub(super) fn registry(&self) -> Registry {
        Registry {
            dir: self.dir.clone(),
            own: self.claim.file_name(),
            netns: self.claim.netns.clone(),
        }
    }

    /// Removes the claim of an installation that has been removed, unless former installations of
    /// its state directory may have left something.
    pub(super) fn forget(self) -> Result<()> {
        crate::locks::may_block("file access");
        let _lock = lock(&self.dir)?;
        let path = self.dir.join(self.claim.file_name());
        let has_former = read(&self.file, &path)?.is_some_and(|now| !now.former.is_empty());
        if has_former {
            return Ok(());
        }
        std::fs::remove_file(&path).map_err(|e| Error::io(format!("remove {}", path.display()), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Flags, NetworkDriver};

    fn config(state_dir: &str, uids: (u32, u32), subnet: Option<&str>) -> Config {
        let nobody = |name: &str| (name == "HOME").then(|| "/nonexistent".to_owned());
        let flags = Flags {
            state_dir: Some(state_dir.into()),
            ..Flags::default()
        };
        let mut config = Config::load(&flags, 1000, &nobody).unwrap();
        (config.qemu.uid_base, config.qemu.uid_count) = uids;
        if let Some(subnet) = subnet {
            (config.network.driver, config.network.subnet) =
                (NetworkDriver::Bridge, subnet.parse().unwrap());
        }
        config
    }

    fn take(config: &Config, dir: &Path) -> Result<Held> {
        super::take(&config.state_dir, &config.qemu, &config.network, dir)
    }

    #[track_caller]
    fn refused(config: &Config, dir: &Path, hints: &[&str], others: &[&str]) {
        let e = take(config, dir).map(drop).unwrap_err();
        let hint = e.hint_text().unwrap();
        assert_eq!(
            (e.kind(), super::super::exit_status(&e)),
            (Kind::Conflict, super::super::run::EXIT_REFUSED)
        );
        assert!(
            hints.iter().all(|h| hint.contains(h)) && !others.iter().any(|h| hint.contains(h)),
            "{hint}"
        );
    }

    #[test]
    fn second_daemon_cannot_claim_taken_resources() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(&config("/a", (5000, 100), Some("10.89.0.0/24")), dir.path()).unwrap();
        for base in [4901, 5000, 5050, 5099] {
            refused(
                &config("/b", (base, 100), None),
                dir.path(),
                &["uid_base"],
                &["subnet"],
            );
        }
        refused(
            &config("/b", (6000, 100), Some("10.89.0.0/16")),
            dir.path(),
            &["subnet = "],
            &["uid_base"],
        );
        refused(
            &config("/b", (5000, 1), Some("10.89.0.128/25")),
            dir.path(),
            &["subnet = ", "uid_base"],
            &[],
        );
        let beside = take(&config("/b", (5100, 100), Some("10.90.0.0/24")), dir.path()).unwrap();
        let before = take(&config("/c", (4900, 100), None), dir.path()).unwrap();
        // The same state directory can be claimed again after the first daemon has exited.
        drop(first);
        drop(take(&config("/a", (5000, 100), Some("10.89.0.0/24")), dir.path()).unwrap());
        // The first daemon has no running VMs, so its uids and subnet are free.
        take(&config("/d", (5000, 100), Some("10.89.0.0/24")), dir.path()).unwrap();
        drop((beside, before));
    }

    #[test]
    fn claim_of_dead_daemon_counts_while_its_vms_run() {
        let dir = tempfile::tempdir().unwrap();
        let install = format!("{:08x}", std::process::id());
        let first = take(&config("/a", (5000, 100), None), dir.path()).unwrap();
        first.registry().set_own(&install).unwrap();
        drop(first);
        let vmm = crate::host::process::spawn(crate::host::process::Spawn {
            program: "sh".into(),
            args: [
                "-c",
                "kill -STOP $$",
                &format!("fc-{install}-0123456789ab-1"),
            ]
            .map(Into::into)
            .to_vec(),
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            cwd: "/".into(),
            output: None,
            credentials: None,
            groups: Vec::new(),
        })
        .unwrap();
        refused(
            &config("/b", (5000, 100), None),
            dir.path(),
            &["uid_base"],
            &[],
        );
        vmm.signal(rustix::process::Signal::KILL).unwrap();
        assert!(
            vmm.wait_uncancelled(Instant::now() + Duration::from_secs(20))
                .unwrap()
        );
        take(&config("/b", (5000, 100), None), dir.path()).unwrap();
    }

    fn gone(registry: &Registry, is_clean: bool) -> Vec<(String, PathBuf)> {
        let mut all = Vec::new();
        registry
            .visit_gone(&mut |gone| {
                assert!(gone.has_network);
                all.push((gone.install_id.clone(), gone.state_dir.clone()));
                is_clean
            })
            .unwrap();
        all
    }

    #[test]
    fn installation_is_gone_without_directory_and_claim() {
        let (dir, states) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let state = |name: &str| states.path().join(name);
        let claim = |name: &str, base, id: &str| {
            let held = take(
                &config(state(name).to_str().unwrap(), (base, 100), None),
                dir.path(),
            )
            .unwrap();
            held.registry().set_own(id).unwrap();
            held
        };
        for name in ["own", "live", "stopped"] {
            std::fs::create_dir(state(name)).unwrap();
        }
        let own = claim("own", 5000, "00000001");
        // Installation "live" runs without its directory, "stopped" has its directory, and "gone"
        // has neither.
        let live = claim("live", 6000, "00000002");
        std::fs::remove_dir(state("live")).unwrap();
        drop(claim("stopped", 7000, "00000003"));
        drop(claim("gone", 8000, "00000004"));
        let registry = own.registry();
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files(), 5, "a lock and four claims");
        for _ in 0..2 {
            assert_eq!(
                gone(&registry, false),
                [("00000004".to_owned(), state("gone"))],
                "it was not forgotten"
            );
        }
        assert_eq!(gone(&registry, true).len(), 1);
        assert_eq!(
            (gone(&registry, true).len(), files()),
            (0, 4),
            "it was forgotten"
        );
        // A disk with a state directory is unmounted and mounted again.
        std::fs::remove_dir(state("stopped")).unwrap();
        assert_eq!(
            gone(&registry, false),
            [("00000003".to_owned(), state("stopped"))]
        );
        std::fs::create_dir(state("stopped")).unwrap();
        assert_eq!(gone(&registry, false), []);
        drop(live);
        assert_eq!(
            gone(&registry, true),
            [("00000002".to_owned(), state("live"))]
        );
    }

    #[test]
    fn installation_is_gone_when_another_uses_its_directory() {
        let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = config(state.path().to_str().unwrap(), (5000, 100), None);
        let claim = |id: &str| {
            let held = take(&config, dir.path()).unwrap();
            assert_eq!(
                gone(&held.registry(), true),
                [],
                "the current installation is not known yet"
            );
            held.registry().set_own(id).unwrap();
            held
        };
        drop(claim("00000001"));
        assert_eq!(gone(&claim("00000001").registry(), true), []);
        drop(claim("00000002"));
        let held = claim("00000003");
        let former = |id: &str| (id.to_owned(), state.path().to_owned());
        assert_eq!(
            gone(&held.registry(), false),
            [former("00000001"), former("00000002")]
        );
        assert_eq!(gone(&held.registry(), true).len(), 2);
        assert_eq!(gone(&held.registry(), true), []);
    }

    #[test]
    fn damaged_claim_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", "{\"state_dir\":\"/a\"}"] {
            std::fs::write(dir.path().join("0.json"), text).unwrap();
            take(&config("/b", (5000, 100), None), dir.path()).unwrap();
        }
    }
}
