//! Configuration: flags over environment over a TOML file over defaults. Pure validation.

mod network;
mod sync;
mod vmm;

pub use sync::SyncedFile;
pub use vmm::{Firecracker, Vmm, VmmDriver, VmmLimits};

pub use network::{INTERFACE_NAME_LEN_MAX, Network, NetworkDriver, Subnet};

use crate::error::{Error, Kind, Result};
use crate::uids::Retention;
use serde::Deserialize;
use std::path::PathBuf;

/// What the file may say. Unknown keys are refused with their line.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// VMs that boot at once; 0 stands for the number of cores.
    pub boots_max: usize,
    /// Workers for guest I/O.
    pub pool_workers: usize,
    /// Workers that one uid may occupy; 0 means three quarters of them, and at least one.
    pub pool_workers_per_uid_max: usize,
    /// Jobs that wait for a worker.
    pub pool_queue: usize,
    pub connections_max: usize,
    pub connections_per_uid_max: usize,
    /// Connections kept back for root.
    pub connections_root_reserved: usize,
    pub operations_per_uid_max: usize,
    /// Ended operations of one uid that are remembered, beside those that an idempotency key stands for.
    pub operations_kept_per_uid: usize,
    /// Ended operations of all uids that are remembered. Over it the uid with the most gives way, root last.
    pub operations_kept_max: usize,
    pub queue_per_uid_max: usize,
    pub vms_per_uid_max: usize,
    /// Image builds that run at once; the others wait in line.
    pub builds_max: usize,
    /// Image builds of one uid that run or wait.
    pub builds_per_uid_max: usize,
    /// Images that one uid has built. Root and the daemon's own user may have any number.
    pub images_per_uid_max: usize,
    /// Memory of all started VMs of one uid; 0 stands for the host's limit.
    pub mem_mib_per_uid_max: u64,
    /// Memory of all started VMs; 0 stands for 80 percent of the host's.
    pub mem_mib_max: u64,
    pub vcpus_max: u32,
    pub disk_bytes_max: u64,
    /// A transfer without a byte for so long ends.
    pub transfer_idle_s: u64,
    /// Bytes per second that a transfer must average over each `transfer_rate_window_s`, or it ends; 0 disables this.
    pub transfer_bytes_per_s_min: u64,
    pub transfer_rate_window_s: u64,
    /// From the VMM's start to the first answer of the guest's SSH server.
    pub boot_timeout_s: u64,
    /// How long a guest may take to shut down before it is forced.
    pub stop_timeout_s: u64,
    /// Of one VM's console, in two files of half of it.
    pub console_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            boots_max: 0,
            pool_workers: 8,
            pool_workers_per_uid_max: 0,
            pool_queue: 64,
            connections_max: 512,
            connections_per_uid_max: 128,
            connections_root_reserved: 4,
            operations_per_uid_max: 64,
            operations_kept_per_uid: crate::uids::RETENTION.per_uid_max,
            operations_kept_max: crate::uids::RETENTION.total_max,
            queue_per_uid_max: 32,
            vms_per_uid_max: 64,
            builds_max: 1,
            builds_per_uid_max: 1,
            images_per_uid_max: 16,
            mem_mib_per_uid_max: 0,
            mem_mib_max: 0,
            vcpus_max: 32,
            disk_bytes_max: 1 << 40,
            transfer_idle_s: 60,
            transfer_bytes_per_s_min: 1024,
            transfer_rate_window_s: 180,
            boot_timeout_s: 120,
            stop_timeout_s: 20,
            console_bytes_max: 4 << 20,
        }
    }
}

impl Limits {
    /// Jobs of one uid that run at once.
    pub fn running_per_uid_max(&self) -> usize {
        match self.pool_workers_per_uid_max {
            0 => (self.pool_workers * 3 / 4).max(1),
            set => set,
        }
    }

    /// The bounds on ended operations that are kept.
    pub fn retention(&self) -> Retention {
        Retention { per_uid_max: self.operations_kept_per_uid, total_max: self.operations_kept_max }
    }
}

/// What a VM gets when its creator does not say.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct VmDefaults {
    pub image: crate::ids::ImageRef,
    pub vcpus: u32,
    pub mem_mib: u64,
}

impl Default for VmDefaults {
    fn default() -> Self {
        Self { image: "default".parse().expect("a valid name"), vcpus: 1, mem_mib: 1024 }
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    #[default]
    Auto,
    Kvm,
    Tcg,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    #[default]
    Auto,
    Microvm,
    Q35,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Qemu {
    pub binary: PathBuf,
    pub accel: Accel,
    pub machine: Machine,
    /// First of the uids that VMs run under when the daemon is root; a VM's gid is the same number.
    pub uid_base: u32,
    /// How many there are. With the bridge's name server the last one is its helper's.
    pub uid_count: u32,
    /// Cuts the guest off from everything but its SSH port.
    pub isolated: bool,
}

impl Qemu {
    /// Of VMs, when the daemon is root.
    pub fn uids(&self) -> std::ops::Range<u32> {
        self.uid_base..self.uid_base.saturating_add(self.uid_count)
    }

    /// Of the name server's helper process, when the daemon has a bridge: the last of the range, which no VM gets then.
    pub fn name_server_uid(&self) -> u32 {
        self.uid_base.saturating_add(self.uid_count.saturating_sub(1))
    }
}

impl Default for Qemu {
    fn default() -> Self {
        // Above systemd's container range, below its foreign range (systemd UIDS-GIDS).
        Self {
            binary: "qemu-system-x86_64".into(),
            accel: Accel::Auto,
            machine: Machine::Auto,
            uid_base: 1_900_000_000,
            uid_count: 65_536,
            isolated: false,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum DiskDriver {
    /// The best that shares the image's blocks.
    #[default]
    Auto,
    Reflink,
    Qcow2,
    DmSnapshot,
    Copy,
}

/// Root disks. A VM keeps the way in which its disk was made.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct Disk {
    pub driver: DiskDriver,
}

/// The file as a whole.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    pub state_dir: Option<PathBuf>,
    pub socket: Option<PathBuf>,
    pub limits: Limits,
    pub vm: VmDefaults,
    pub vmm: Vmm,
    pub qemu: Qemu,
    pub firecracker: Firecracker,
    pub disk: Disk,
    pub network: Network,
    pub sync: Vec<SyncedFile>,
}

/// What the flags said.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub config: Option<PathBuf>,
    pub state_dir: Option<PathBuf>,
    pub socket: Option<PathBuf>,
}

/// Where things are by default, for this user.
#[derive(Clone, Debug, PartialEq)]
pub struct Places {
    pub config: PathBuf,
    pub state_dir: PathBuf,
    pub socket: PathBuf,
}

impl Places {
    /// Root: `/etc/fcd`, `/var/lib/fcd`, `/run/fcd`; a user: the XDG base directories.
    pub fn for_user(uid: u32, env: &dyn Fn(&str) -> Option<String>) -> Self {
        let dir = |name: &str| env(name).filter(|v| v.starts_with('/')).map(PathBuf::from);
        if uid == 0 {
            return Self {
                config: "/etc/fcd/config.toml".into(),
                state_dir: "/var/lib/fcd".into(),
                socket: "/run/fcd/fcd.sock".into(),
            };
        }
        let home = dir("HOME").unwrap_or_else(|| "/".into());
        let config = dir("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config"));
        let state_dir = dir("XDG_STATE_HOME").unwrap_or_else(|| home.join(".local/state")).join("fcd");
        // Without a runtime directory of the session, the state directory is as private.
        let socket = dir("XDG_RUNTIME_DIR").map_or_else(|| state_dir.join("fcd.sock"), |d| d.join("fcd/fcd.sock"));
        Self { config: config.join("fcd/config.toml"), state_dir, socket }
    }
}

/// The configuration that holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    pub limits: Limits,
    pub vm: VmDefaults,
    pub vmm: Vmm,
    pub qemu: Qemu,
    pub firecracker: Firecracker,
    pub disk: Disk,
    pub network: Network,
    pub sync: Vec<SyncedFile>,
}

impl Config {
    /// Reads the file that flags, `FCD_CONFIG` or the default name. Only the default may be missing.
    pub fn load(flags: &Flags, uid: u32, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let places = Places::for_user(uid, env);
        let named = flags.config.clone().or_else(|| env("FCD_CONFIG").map(PathBuf::from));
        let path = named.clone().unwrap_or(places.config.clone());
        let file = match std::fs::read_to_string(&path) {
            Ok(text) => parse(&text).map_err(|e| {
                e.context(format!("read configuration {}", path.display())).hint("correct that line, or take it out")
            })?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && named.is_none() => File::default(),
            Err(e) => {
                let e = Error::new(Kind::InvalidConfig, format!("read configuration {}", path.display())).with_source(e);
                return Err(e.hint("name a file that can be read with --config or FCD_CONFIG, or leave both out"));
            }
        };
        let pick = |flag: &Option<PathBuf>, name: &str, file: Option<PathBuf>, default: PathBuf| {
            flag.clone().or_else(|| env(name).filter(|v| !v.is_empty()).map(PathBuf::from)).or(file).unwrap_or(default)
        };
        // VMMs work in directories of their own.
        let absolute = |path: PathBuf| {
            let e = |e| Error::new(Kind::InvalidConfig, format!("find out where {} is", path.display())).with_source(e);
            std::path::absolute(&path).map_err(e)
        };
        let config = Config {
            state_dir: absolute(pick(&flags.state_dir, "FCD_STATE_DIR", file.state_dir, places.state_dir))?,
            socket: absolute(pick(&flags.socket, "FCD_SOCKET", file.socket, places.socket))?,
            limits: file.limits,
            vm: file.vm,
            vmm: file.vmm,
            qemu: file.qemu,
            firecracker: file.firecracker,
            disk: file.disk,
            network: file.network,
            sync: file.sync,
        };
        config.validate().map_err(|e| e.hint(format!("change it in {}", path.display())))?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        let bad = |what: &str| Err(Error::new(Kind::InvalidConfig, what.to_owned()));
        let l = &self.limits;
        if l.pool_workers == 0 || l.pool_workers > 256 {
            return bad("limits.pool_workers must be 1 to 256");
        }
        if l.pool_queue == 0 {
            return bad("limits.pool_queue must be at least 1");
        }
        if l.operations_kept_per_uid == 0 || l.operations_kept_max < l.operations_kept_per_uid {
            return bad("limits.operations_kept_per_uid must be at least 1 and at most operations_kept_max");
        }
        if l.connections_root_reserved >= l.connections_max || l.connections_per_uid_max == 0 {
            return bad("limits.connections_max must be above connections_root_reserved, connections_per_uid_max above 0");
        }
        if l.builds_max == 0 {
            return bad("limits.builds_max must be at least 1");
        }
        if l.transfer_rate_window_s == 0 {
            return bad("limits.transfer_rate_window_s must be at least 1");
        }
        if l.transfer_idle_s == 0 || l.boot_timeout_s == 0 {
            return bad("limits.transfer_idle_s and boot_timeout_s must be at least 1");
        }
        if self.vm.vcpus == 0 || self.vm.mem_mib < MEM_MIB_MIN {
            return bad("vm.vcpus must be at least 1, vm.mem_mib at least 128");
        }
        if self.qemu.uid_base < 1000 || self.qemu.uid_count == 0 || self.qemu.uid_base.checked_add(self.qemu.uid_count).is_none()
        {
            return bad("qemu.uid_base must be at least 1000 and the range must fit 32 bits");
        }
        if self.network.is_bridge() && self.network.dns && self.qemu.uid_count < 2 {
            return bad("qemu.uid_count must be at least 2 with a bridge: one uid is the name server's");
        }
        sync::validate(&self.sync)?;
        vmm::validate(&self.vmm, self.network.is_bridge())?;
        self.network.validate()
    }
}

/// Less does not boot a Debian kernel.
pub const MEM_MIB_MIN: u64 = 128;

fn parse(text: &str) -> Result<File> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map_or(1, |s| text[..s.start.min(text.len())].matches('\n').count() + 1);
        Error::new(Kind::InvalidConfig, format!("line {line}: {}", e.message()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        let e = parse("[limits]\nboots_max = 2\nbots_max = 3\n").unwrap_err().to_string();
        assert!(e.starts_with("line 3: unknown field `bots_max`"), "{e}");
    }

    #[test]
    fn flags_win_over_environment_over_file_over_default() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "state_dir = \"/file\"\nsocket = \"/file.sock\"\n").unwrap();
        let env = |name: &str| match name {
            "FCD_CONFIG" => Some(path.display().to_string()),
            "FCD_SOCKET" => Some("/env.sock".to_owned()),
            _ => None,
        };
        let c = Config::load(&Flags::default(), 0, &env).unwrap();
        assert_eq!((c.state_dir.to_str(), c.socket.to_str()), (Some("/file"), Some("/env.sock")));
        let flags = Flags { socket: Some("/flag.sock".into()), ..Flags::default() };
        assert_eq!(Config::load(&flags, 0, &env).unwrap().socket.to_str(), Some("/flag.sock"));
    }

    #[test]
    fn relative_paths_are_of_the_working_directory() {
        let flags = Flags { state_dir: Some("state".into()), socket: Some("./fcd.sock".into()), ..Flags::default() };
        let c = Config::load(&flags, 1000, &|name| (name == "HOME").then(|| "/nonexistent".to_owned())).unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!((c.state_dir, c.socket), (here.join("state"), here.join("fcd.sock")));
    }

    #[test]
    fn places_for_a_user_follow_xdg() {
        let env = |name: &str| (name == "HOME").then(|| "/home/u".to_owned());
        let p = Places::for_user(1000, &env);
        assert_eq!(p.state_dir.to_str(), Some("/home/u/.local/state/fcd"));
        assert_eq!(p.socket.to_str(), Some("/home/u/.local/state/fcd/fcd.sock"));
        assert_eq!(p.config.to_str(), Some("/home/u/.config/fcd/config.toml"));
    }

    #[test]
    fn a_named_file_must_exist() {
        let flags = Flags { config: Some("/nonexistent/x.toml".into()), ..Flags::default() };
        assert_eq!(Config::load(&flags, 0, &|_| None).unwrap_err().kind(), Kind::InvalidConfig);
    }

    fn config(file: File) -> Config {
        Config {
            state_dir: "/s".into(),
            socket: "/k".into(),
            limits: file.limits,
            vm: file.vm,
            vmm: file.vmm,
            qemu: file.qemu,
            firecracker: file.firecracker,
            disk: file.disk,
            network: file.network,
            sync: file.sync,
        }
    }

    #[test]
    fn senseless_limits_are_refused() {
        let mut file = File::default();
        file.limits.pool_workers = 0;
        assert!(config(file).validate().is_err());
    }

    #[test]
    fn name_server_has_a_uid_of_its_own_with_a_bridge() {
        let of = |driver, uid_count| {
            let mut file = File::default();
            (file.network.driver, file.qemu.uid_base, file.qemu.uid_count) = (driver, 5000, uid_count);
            config(file)
        };
        let ten = of(NetworkDriver::Bridge, 10);
        assert_eq!((ten.qemu.uids().last(), ten.qemu.name_server_uid()), (Some(5009), 5009));
        assert!(ten.validate().is_ok() && of(NetworkDriver::User, 1).validate().is_ok());
        let e = of(NetworkDriver::Bridge, 1).validate().unwrap_err();
        assert!(e.to_string().contains("qemu.uid_count must be at least 2"), "{e}");
    }
}
