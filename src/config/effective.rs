//! The effective configuration: every setting with its value and the origin of the value.

use super::section::toml_value;
use super::{Config, Flags};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// The origin of a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    #[default]
    Default,
    File,
    Environment,
    Flag,
}

/// The origins of the values of a configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Origins {
    /// The file that was read.
    pub file: Option<PathBuf>,
    state_dir: Origin,
    socket: Origin,
    /// The settings in the file, such as `limits.pool_workers`.
    in_file: BTreeSet<String>,
}

/// One setting.
#[derive(Clone, Debug, PartialEq)]
pub struct EffectiveValue {
    /// The setting's name, such as `limits.pool_workers`.
    pub key: String,
    /// The value as in the file.
    pub value: String,
    pub origin: Origin,
    /// The path of the file, the variable or the flag.
    pub from: Option<String>,
}

/// The names of the variable and the flag that set a path.
struct Names {
    variable: &'static str,
    flag: &'static str,
}

const STATE_DIR: Names = Names {
    variable: "FCD_STATE_DIR",
    flag: "--state-dir",
};
const SOCKET: Names = Names {
    variable: "FCD_SOCKET",
    flag: "--socket",
};

impl Origins {
    /// Finds the origins in all sources. `text` is the content of the file, if one was read.
    pub(super) fn of(
        flags: &Flags,
        env: &dyn Fn(&str) -> Option<String>,
        file: Option<(PathBuf, &str)>,
    ) -> Self {
        let table: toml::Table = file
            .as_ref()
            .and_then(|(_, text)| toml::from_str(text).ok())
            .unwrap_or_default();
        let in_file: BTreeSet<String> = table
            .iter()
            .flat_map(|(name, value)| match value {
                toml::Value::Table(section) => section
                    .keys()
                    .map(|setting| format!("{name}.{setting}"))
                    .collect(),
                _ => vec![name.clone()],
            })
            .collect();
        let pick = |flag: &Option<PathBuf>, names: &Names, key: &str| {
            if flag.is_some() {
                Origin::Flag
            } else if env(names.variable).is_some_and(|value| !value.is_empty()) {
                Origin::Environment
            } else if in_file.contains(key) {
                Origin::File
            } else {
                Origin::Default
            }
        };
        Self {
            state_dir: pick(&flags.state_dir, &STATE_DIR, "state_dir"),
            socket: pick(&flags.socket, &SOCKET, "socket"),
            file: file.map(|(path, _)| path),
            in_file,
        }
    }

    fn from(&self, origin: Origin, names: Option<&Names>) -> Option<String> {
        match (origin, names) {
            (Origin::File, _) => self.file.as_ref().map(|path| path.display().to_string()),
            (Origin::Environment, Some(names)) => Some(names.variable.to_owned()),
            (Origin::Flag, Some(names)) => Some(names.flag.to_owned()),
            _ => None,
        }
    }
}

#[derive(Serialize)]
struct Synced<'a> {
    from: &'a PathBuf,
    to: &'a PathBuf,
    mode: String,
}

impl Config {
    /// Returns every setting, in the order of the reference.
    pub fn effective(&self) -> Vec<EffectiveValue> {
        let origins = &self.origins;
        let path = |key: &str, path: &PathBuf, origin, names| EffectiveValue {
            key: key.to_owned(),
            value: toml_value(path),
            origin,
            from: origins.from(origin, Some(names)),
        };
        let mut all = vec![
            path("state_dir", &self.state_dir, origins.state_dir, &STATE_DIR),
            path("socket", &self.socket, origins.socket, &SOCKET),
        ];
        let mut add = |key: String, value: String| {
            let origin = if origins.in_file.contains(&key) {
                Origin::File
            } else {
                Origin::Default
            };
            let from = origins.from(origin, None);
            all.push(EffectiveValue {
                key,
                value,
                origin,
                from,
            });
        };
        for (section, values) in [
            ("limits", self.limits.values()),
            ("vm", self.vm.values()),
            ("vmm", self.vmm.values()),
            ("qemu", self.qemu.values()),
            ("firecracker", self.firecracker.values()),
            ("disk", self.disk.values()),
            ("network", self.network.values()),
            ("registry", self.registry.values()),
        ] {
            for (name, value) in values {
                add(format!("{section}.{name}"), value);
            }
        }
        let synced: Vec<Synced<'_>> = self
            .sync
            .iter()
            .map(|file| Synced {
                from: &file.from,
                to: &file.to,
                mode: format!("{:04o}", file.mode()),
            })
            .collect();
        let text = serde_json::to_string(&synced).expect("paths and texts");
        add("sync".to_owned(), text);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn load(flags: &Flags, file: &Path, state_dir: Option<&str>) -> Vec<EffectiveValue> {
        let env = |name: &str| match name {
            "FCD_CONFIG" => Some(file.display().to_string()),
            "FCD_STATE_DIR" => state_dir.map(str::to_owned),
            _ => None,
        };
        Config::load(flags, 0, &env).unwrap().effective()
    }

    #[test]
    fn every_value_has_its_source() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(
            &file,
            "socket = \"/f.sock\"\n[vm]\nvcpus = 3\n[[sync]]\nfrom = \"/a\"\nto = \"/b\"\n",
        )
        .unwrap();
        let flags = Flags {
            socket: Some("/flag.sock".into()),
            ..Flags::default()
        };
        let all = load(&flags, &file, Some("/env"));
        let of = |key: &str| {
            let found = all.iter().find(|v| v.key == key).unwrap();
            (
                found.value.as_str(),
                found.origin,
                found.from.as_deref().unwrap_or(""),
            )
        };
        let path = file.to_str().unwrap();
        assert_eq!(
            of("state_dir"),
            ("\"/env\"", Origin::Environment, "FCD_STATE_DIR")
        );
        assert_eq!(of("socket"), ("\"/flag.sock\"", Origin::Flag, "--socket"));
        assert_eq!(of("vm.vcpus"), ("3", Origin::File, path));
        assert_eq!(of("vm.mem_mib").1, Origin::Default);
        let synced = r#"[{"from":"/a","to":"/b","mode":"0644"}]"#;
        assert_eq!(of("sync"), (synced, Origin::File, path));
        let plain = load(&Flags::default(), &file, None);
        assert_eq!(plain[0].origin, Origin::Default);
        assert_eq!(
            (plain[1].origin, plain[1].from.as_deref()),
            (Origin::File, Some(path))
        );
    }

    /// A new section must be shown, too.
    #[test]
    fn every_setting_of_the_reference_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "").unwrap();
        let all = load(&Flags::default(), &file, None);
        let mut section = String::new();
        for line in super::super::reference().lines() {
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_end_matches(']').to_owned() + ".";
            }
            let is_setting = line.starts_with('#') && !line.starts_with("# ");
            let Some((name, value)) = line[1.min(line.len())..].split_once(" = ") else {
                continue;
            };
            // The settings of [[sync]] have no values.
            if !is_setting || ["from", "to", "mode"].contains(&name) {
                continue;
            }
            let key = format!("{section}{name}");
            let found = all.iter().find(|v| v.key == key);
            assert_eq!(found.map(|v| v.value.as_str()), Some(value), "{key}");
        }
    }
}
