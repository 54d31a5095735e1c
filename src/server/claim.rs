//! Claims of a root daemon on the host for its VMs: a range of uids and, with a bridge, a subnet. Two daemons with two
//! state directories would give their VMs the same ones, and each other's VMM could then reach the other's files. So each
//! daemon claims its own before it makes anything.
//!
//! A claim is a file in [`DIR`], which a reboot empties. The daemon holds an flock(2) on its own. VMs outlive their daemon,
//! so the claim of a daemon that is gone counts for as long as VMs of its installation run.

use crate::config::{Config, Subnet};
use crate::error::{Error, Kind, Result};
use crate::host::process::find_by_prefix;
use rustix::fs::{FlockOperation, OFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where claims are.
pub(super) const DIR: &str = "/run/fcd-claims";
/// Held for as long as claims are compared: milliseconds.
const LOCK_FILE: &str = "lock";
const LOCK_DEADLINE: Duration = Duration::from_secs(10);
const LOCK_PERIOD: Duration = Duration::from_millis(20);
const CLAIM_BYTES_MAX: u64 = 64 * 1024;

/// A claim, as its file has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Claim {
    state_dir: PathBuf,
    pid: u32,
    uid_base: u32,
    uid_count: u32,
    /// With a bridge: in the network namespace `netns` only.
    subnet: Option<String>,
    netns: PathBuf,
    /// The installation's id, as in the tags of its VMs; none while nothing was made.
    install_id: Option<String>,
}

/// The daemon's own claim, which counts while this lives and as long as VMs run afterwards.
pub(super) struct Held {
    file: File,
    claim: Claim,
}

impl Claim {
    fn of(config: &Config) -> Result<Self> {
        const NETNS: &str = "/proc/self/ns/net";
        let netns = std::fs::read_link(NETNS).map_err(|e| Error::io(format!("read {NETNS}"), e))?;
        Ok(Self {
            state_dir: config.state_dir.clone(),
            pid: std::process::id(),
            uid_base: config.qemu.uid_base,
            uid_count: config.qemu.uid_count,
            subnet: config.network.is_bridge().then(|| config.network.subnet.to_string()),
            netns,
            install_id: None,
        })
    }

    /// The name of its file: one for each state directory.
    fn file_name(&self) -> String {
        let hash = Sha256::digest(self.state_dir.as_os_str().as_encoded_bytes());
        hash.iter().take(8).map(|b| format!("{b:02x}")).collect::<String>() + ".json"
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
        let uids = format!("uids {} to {}", other.uid_base, other.uid_base.saturating_add(other.uid_count) - 1);
        let subnet = other.subnet.clone().unwrap_or_default();
        let set_uids = "other uids for VMs: uid_base = ... and uid_count = ... under [qemu]";
        let set_subnet = "another subnet: subnet = ... under [network]";
        let (what, set) = match (self.shares_uids(other), self.shares_subnet(other)) {
            (false, false) => return None,
            (true, false) => (uids, set_uids.to_owned()),
            (false, true) => (format!("subnet {subnet}"), set_subnet.to_owned()),
            (true, true) => (format!("{uids} and subnet {subnet}"), format!("{set_uids}, and {set_subnet}")),
        };
        let whose = format!("another fcd (process {}, state directory {})", other.pid, other.state_dir.display());
        let text = format!("claim what VMs get of this host: {what} are those of {whose} or of VMs that it left running");
        Some(Error::new(Kind::Conflict, text).hint(format!("stop that one and its VMs, or set {set}")))
    }
}

/// Claims the uids and the subnet of `config` for its state directory.
///
/// # Errors
/// `conflict` when another installation has some of them, with the setting that helps; `host`.
pub(super) fn take(config: &Config, dir: &Path) -> Result<Held> {
    drop(crate::host::fs::create_dir(dir, 0o700)?);
    let claim = Claim::of(config)?;
    let lock = open(&dir.join(LOCK_FILE))?;
    flock(&lock, &dir.join(LOCK_FILE))?;
    let own = claim.file_name();
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io(format!("read {}", dir.display()), e))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.as_encoded_bytes().ends_with(b".json") && name != *own {
            look_at(&claim, &entry.path())?;
        }
    }
    let path = dir.join(own);
    let file = open(&path)?;
    // A child of the daemon before may hold it until it has become another program.
    flock(&file, &path)?;
    let mut held = Held { file, claim };
    held.write()?;
    Ok(held)
}

/// Refuses what another claim has, and removes one that nobody needs any more.
fn look_at(claim: &Claim, path: &Path) -> Result<()> {
    let mut file = open(path)?;
    let is_held = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err();
    let mut text = String::new();
    (&mut file).take(CLAIM_BYTES_MAX).read_to_string(&mut text).map_err(|e| Error::io(format!("read {}", path.display()), e))?;
    // Cut off in the middle of being written, before anything was made: it claims nothing.
    let Ok(other) = serde_json::from_str::<Claim>(&text) else { return Ok(()) };
    let has_vms = || match &other.install_id {
        Some(id) => find_by_prefix(&format!("fc-{id}-")).map(|found| !found.is_empty()),
        None => Ok(false),
    };
    if is_held || has_vms()? {
        return claim.conflict(&other).map_or(Ok(()), Err);
    }
    std::fs::remove_file(path).map_err(|e| Error::io(format!("remove {}", path.display()), e))
}

fn open(path: &Path) -> Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(path, flags, rustix::fs::Mode::from_raw_mode(0o600));
    fd.map(File::from).map_err(|e| Error::io(format!("open {}", path.display()), e))
}

fn flock(file: &File, path: &Path) -> Result<()> {
    let deadline = Instant::now() + LOCK_DEADLINE;
    while rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() > deadline {
            return Err(Error::new(Kind::Busy, format!("lock {}: another process holds it", path.display()))
                .hint(format!("see which: fuser -v {}", path.display())));
        }
        std::thread::sleep(LOCK_PERIOD);
    }
    Ok(())
}

impl Held {
    /// From now on VMs of this installation keep the claim.
    pub(super) fn set_install_id(&mut self, id: &str) -> Result<()> {
        self.claim.install_id = Some(id.to_owned());
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        let text = serde_json::to_vec(&self.claim).map_err(|e| Error::internal("write a claim").with_source(e))?;
        let mut write = || {
            self.file.set_len(0)?;
            self.file.rewind()?;
            self.file.write_all(&text)
        };
        write().map_err(|e| Error::io("write the claim of uids and subnet", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Flags, NetworkDriver};

    fn config(state_dir: &str, uids: (u32, u32), subnet: Option<&str>) -> Config {
        let nobody = |name: &str| (name == "HOME").then(|| "/nonexistent".to_owned());
        let flags = Flags { state_dir: Some(state_dir.into()), ..Flags::default() };
        let mut config = Config::load(&flags, 1000, &nobody).unwrap();
        (config.qemu.uid_base, config.qemu.uid_count) = uids;
        if let Some(subnet) = subnet {
            (config.network.driver, config.network.subnet) = (NetworkDriver::Bridge, subnet.parse().unwrap());
        }
        config
    }

    #[track_caller]
    fn refused(config: &Config, dir: &Path, hints: &[&str], others: &[&str]) {
        let e = take(config, dir).map(drop).unwrap_err();
        let hint = e.hint_text().unwrap();
        assert_eq!((e.kind(), super::super::exit_status(&e)), (Kind::Conflict, super::super::run::EXIT_REFUSED));
        assert!(hints.iter().all(|h| hint.contains(h)) && !others.iter().any(|h| hint.contains(h)), "{hint}");
    }

    #[test]
    fn second_daemon_is_refused_what_first_one_has() {
        let dir = tempfile::tempdir().unwrap();
        let first = take(&config("/a", (5000, 100), Some("10.89.0.0/24")), dir.path()).unwrap();
        for base in [4901, 5000, 5050, 5099] {
            refused(&config("/b", (base, 100), None), dir.path(), &["uid_base"], &["subnet"]);
        }
        refused(&config("/b", (6000, 100), Some("10.89.0.0/16")), dir.path(), &["subnet = "], &["uid_base"]);
        refused(&config("/b", (5000, 1), Some("10.89.0.128/25")), dir.path(), &["subnet = ", "uid_base"], &[]);
        let beside = take(&config("/b", (5100, 100), Some("10.90.0.0/24")), dir.path()).unwrap();
        let before = take(&config("/c", (4900, 100), None), dir.path()).unwrap();
        // The same state directory again, after the first daemon has gone.
        drop(first);
        drop(take(&config("/a", (5000, 100), Some("10.89.0.0/24")), dir.path()).unwrap());
        // Nothing of it runs: what it had is free.
        take(&config("/d", (5000, 100), Some("10.89.0.0/24")), dir.path()).unwrap();
        drop((beside, before));
    }

    #[test]
    fn claim_of_dead_daemon_counts_while_its_vms_run() {
        let dir = tempfile::tempdir().unwrap();
        let install = format!("{:08x}", std::process::id());
        let mut first = take(&config("/a", (5000, 100), None), dir.path()).unwrap();
        first.set_install_id(&install).unwrap();
        drop(first);
        let vmm = crate::host::process::spawn(crate::host::process::Spawn {
            program: "sh".into(),
            args: ["-c", "kill -STOP $$", &format!("fc-{install}-0123456789ab-1")].map(Into::into).to_vec(),
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            cwd: "/".into(),
            output: None,
            credentials: None,
        })
        .unwrap();
        refused(&config("/b", (5000, 100), None), dir.path(), &["uid_base"], &[]);
        vmm.signal(rustix::process::Signal::KILL).unwrap();
        assert!(vmm.wait_uncancelled(Instant::now() + Duration::from_secs(20)).unwrap());
        take(&config("/b", (5000, 100), None), dir.path()).unwrap();
    }

    #[test]
    fn damaged_claim_is_no_claim() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["", "{", "{\"state_dir\":\"/a\"}"] {
            std::fs::write(dir.path().join("0.json"), text).unwrap();
            take(&config("/b", (5000, 100), None), dir.path()).unwrap();
        }
    }
}
