//! The daemon's configuration, from four sources. A flag overrides an environment variable, which
//! overrides the TOML file, which overrides the default.
//!
//! Each section of the file is declared once, with [`section::section`]. The declaration gives the
//! defaults and the section's part of the reference that `fcd --print-config` prints.

mod disk;
mod effective;
mod ipv6_subnet;
mod limits;
mod network;
mod qemu;
mod reference;
mod registry;
mod section;
mod sync;
mod vm;
mod vmm;

pub use disk::{Disk, DiskDriver};
pub use effective::{Origin, Origins};
pub use ipv6_subnet::{Ipv6Network, Ipv6Subnet};
pub use limits::Limits;
#[cfg(any(test, feature = "fakes"))]
pub use network::{INTERFACE_NAME_LEN_MAX, NetworkDriver};
pub use network::{Ipv6, Network, Subnet};
pub use qemu::{Accel, Machine, Qemu};
pub use reference::reference;
pub use registry::Registry;
pub use sync::SyncedFile;
pub use vm::VmDefaults;
pub use vmm::{Firecracker, Vmm, VmmDriver, VmmLimits};

use crate::error::{Error, Kind, Result};
use serde::Deserialize;
use std::path::PathBuf;

/// The configuration file.
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
    pub registry: Registry,
    pub sync: Vec<SyncedFile>,
}

/// The command-line flags that belong to the configuration.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub config: Option<PathBuf>,
    pub state_dir: Option<PathBuf>,
    pub socket: Option<PathBuf>,
}

/// The default paths for one user.
#[derive(Clone, Debug, PartialEq)]
pub struct Places {
    pub config: PathBuf,
    pub state_dir: PathBuf,
    pub socket: PathBuf,
}

impl Places {
    /// Returns the default paths. Root gets `/etc/fcd`, `/var/lib/fcd` and `/run/fcd`. Other users
    /// get the XDG base directories.
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
        let state_dir = dir("XDG_STATE_HOME")
            .unwrap_or_else(|| home.join(".local/state"))
            .join("fcd");
        // The state directory is as private as a runtime directory would be.
        let socket = dir("XDG_RUNTIME_DIR")
            .map_or_else(|| state_dir.join("fcd.sock"), |d| d.join("fcd/fcd.sock"));
        Self {
            config: config.join("fcd/config.toml"),
            state_dir,
            socket,
        }
    }
}

/// The effective configuration, after all sources were merged.
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
    pub registry: Registry,
    pub sync: Vec<SyncedFile>,
    pub origins: Origins,
}

impl Config {
    /// Reads the file that the flags, `FCD_CONFIG` or the default names. Only the default file may
    /// be missing.
    pub fn load(flags: &Flags, uid: u32, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let places = Places::for_user(uid, env);
        let named = flags
            .config
            .clone()
            .or_else(|| env("FCD_CONFIG").map(PathBuf::from));
        let path = named.clone().unwrap_or(places.config.clone());
        let (file, origins) = match std::fs::read_to_string(&path) {
            Ok(text) => {
                let file = parse(&text).map_err(|e| {
                    e.context(format!("read configuration {}", path.display()))
                        .hint("correct or remove that line")
                })?;
                (file, Origins::of(flags, env, Some((path.clone(), &text))))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
                (File::default(), Origins::of(flags, env, None))
            }
            Err(e) => {
                let e = Error::new(
                    Kind::InvalidConfig,
                    format!("read configuration {}", path.display()),
                )
                .with_source(e);
                return Err(e.hint(
                    "name a file that can be read with --config or FCD_CONFIG, or leave both out",
                ));
            }
        };
        let pick = |flag: &Option<PathBuf>, name: &str, file: Option<PathBuf>, default: PathBuf| {
            flag.clone()
                .or_else(|| env(name).filter(|v| !v.is_empty()).map(PathBuf::from))
                .or(file)
                .unwrap_or(default)
        };
        // VMMs run in their own directories, where a relative path would name another file.
        let absolute = |path: PathBuf| {
            let e = |e| {
                Error::new(
                    Kind::InvalidConfig,
                    format!("resolve path {}", path.display()),
                )
                .with_source(e)
            };
            std::path::absolute(&path).map_err(e)
        };
        let config = Config {
            state_dir: absolute(pick(
                &flags.state_dir,
                "FCD_STATE_DIR",
                file.state_dir,
                places.state_dir,
            ))?,
            socket: absolute(pick(
                &flags.socket,
                "FCD_SOCKET",
                file.socket,
                places.socket,
            ))?,
            limits: file.limits,
            vm: file.vm,
            vmm: file.vmm,
            qemu: file.qemu,
            firecracker: file.firecracker,
            disk: file.disk,
            network: file.network,
            registry: file.registry,
            sync: file.sync,
            origins,
        };
        config
            .validate()
            .map_err(|e| e.hint(format!("change it in {}", path.display())))?;
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
            return bad(
                "limits.operations_kept_per_uid must be at least 1 and at most operations_kept_max",
            );
        }
        if l.connections_root_reserved >= l.connections_max || l.connections_per_uid_max == 0 {
            return bad(
                "limits.connections_max must be above connections_root_reserved, connections_per_uid_max above 0",
            );
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
        if self.qemu.uid_base < 1000
            || self.qemu.uid_count == 0
            || self
                .qemu
                .uid_base
                .checked_add(self.qemu.uid_count)
                .is_none()
        {
            return bad("qemu.uid_base must be at least 1000 and the range must fit 32 bits");
        }
        if self.qemu.uid_count < 2 {
            return bad("qemu.uid_count must be at least 2: one uid is for helper processes");
        }
        registry::validate(&self.registry)?;
        sync::validate(&self.sync)?;
        vmm::validate(&self.vmm, self.network.is_bridge())?;
        self.network.validate()
    }
}

/// The least memory of a VM. A Debian kernel does not boot with less.
pub const MEM_MIB_MIN: u64 = 128;

fn parse(text: &str) -> Result<File> {
    toml::from_str(text).map_err(|e| {
        let line = e.span().map_or(1, |s| {
            text[..s.start.min(text.len())].matches('\n').count() + 1
        });
        Error::new(Kind::InvalidConfig, format!("line {line}: {}", e.message()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_unknown_key_is_rejected_with_its_line() {
        let e = parse("[limits]\nboots_max = 2\nbots_max = 3\n")
            .unwrap_err()
            .to_string();
        assert!(e.starts_with("line 3: unknown field `bots_max`"), "{e}");
    }

    #[test]
    fn config_precedence_is_flag_environment_file_default() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, "state_dir = \"/file\"\nsocket = \"/file.sock\"\n").unwrap();
        let env = |name: &str| match name {
            "FCD_CONFIG" => Some(path.display().to_string()),
            "FCD_SOCKET" => Some("/env.sock".to_owned()),
            _ => None,
        };
        let c = Config::load(&Flags::default(), 0, &env).unwrap();
        assert_eq!(
            (c.state_dir.to_str(), c.socket.to_str()),
            (Some("/file"), Some("/env.sock"))
        );
        let flags = Flags {
            socket: Some("/flag.sock".into()),
            ..Flags::default()
        };
        assert_eq!(
            Config::load(&flags, 0, &env).unwrap().socket.to_str(),
            Some("/flag.sock")
        );
    }

    #[test]
    fn config_relative_path_is_resolved_from_working_directory() {
        let flags = Flags {
            state_dir: Some("state".into()),
            socket: Some("./fcd.sock".into()),
            ..Flags::default()
        };
        let c = Config::load(&flags, 1000, &|name| {
            (name == "HOME").then(|| "/nonexistent".to_owned())
        })
        .unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            (c.state_dir, c.socket),
            (here.join("state"), here.join("fcd.sock"))
        );
    }

    #[test]
    fn places_of_user_follow_xdg() {
        let env = |name: &str| (name == "HOME").then(|| "/home/u".to_owned());
        let p = Places::for_user(1000, &env);
        assert_eq!(p.state_dir.to_str(), Some("/home/u/.local/state/fcd"));
        assert_eq!(p.socket.to_str(), Some("/home/u/.local/state/fcd/fcd.sock"));
        assert_eq!(p.config.to_str(), Some("/home/u/.config/fcd/config.toml"));
    }

    #[test]
    fn config_named_file_must_exist() {
        let flags = Flags {
            config: Some("/nonexistent/x.toml".into()),
            ..Flags::default()
        };
        assert_eq!(
            Config::load(&flags, 0, &|_| None).unwrap_err().kind(),
            Kind::InvalidConfig
        );
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
            registry: file.registry,
            sync: file.sync,
            origins: Origins::default(),
        }
    }

    #[test]
    fn config_invalid_limits_are_rejected() {
        let mut file = File::default();
        file.limits.pool_workers = 0;
        assert!(config(file).validate().is_err());
    }

    #[test]
    fn helper_processes_have_the_last_uid() {
        let of = |uid_count| {
            let mut file = File::default();
            (file.qemu.uid_base, file.qemu.uid_count) = (5000, uid_count);
            config(file)
        };
        let ten = of(10);
        assert_eq!(
            (ten.qemu.uids().last(), ten.qemu.helper_uid()),
            (Some(5009), 5009)
        );
        assert!(ten.validate().is_ok());
        let e = of(1).validate().unwrap_err();
        assert!(
            e.to_string().contains("qemu.uid_count must be at least 2"),
            "{e}"
        );
    }
}
