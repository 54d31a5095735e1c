//! `config`: shows the daemon's effective configuration, and checks a configuration file.

use super::connector::Connector;
use super::context::{Context, Env};
use super::output;
use super::printer::Printer;
use crate::api::Empty;
use crate::api::daemon::{ConfigShow, ConfigSource, ConfigValue};
use crate::client::Result;
use crate::config::{Config, Flags, Places};
use crate::host::text::printable;
use std::path::PathBuf;

#[derive(clap::Subcommand, Debug)]
pub(super) enum Verb {
    /// Show every setting of the running daemon, its value, and where the value is from
    Show {
        /// Leave out settings with their defaults
        #[arg(short, long)]
        changed: bool,
    },
    /// Check a configuration file, and list what differs from the running daemon
    Check {
        /// The file [default: the one that fcd reads]
        file: Option<PathBuf>,
    },
}

pub(super) fn run(ctx: &mut Context, verb: Verb) -> Result<u8> {
    let Context {
        connector,
        printer,
        env,
        ..
    } = ctx;
    match verb {
        Verb::Show { changed } => show(connector, printer, changed),
        Verb::Check { file } => check(connector, printer, &**env, file),
    }
}

fn show(connector: &mut Connector, printer: &mut Printer, changed: bool) -> Result<u8> {
    let mut values = running(connector, printer)?;
    if changed {
        values.retain(|value| value.source != ConfigSource::Default);
    }
    if printer.json {
        printer.document(&values)?;
        return Ok(0);
    }
    let rows: Vec<_> = values
        .iter()
        .map(|v| vec![v.key.clone(), v.value.clone(), source(v)])
        .collect();
    printer.text(&output::table(&["SETTING", "VALUE", "SOURCE"], &rows))?;
    Ok(0)
}

fn running(connector: &mut Connector, printer: &mut Printer) -> Result<Vec<ConfigValue>> {
    let mut client = connector.connect(printer)?;
    Ok(client.call::<ConfigShow>(&Empty {})?.values)
}

fn source(value: &ConfigValue) -> String {
    let from = value.from.as_deref().unwrap_or_default();
    match value.source {
        ConfigSource::Default => "default".to_owned(),
        ConfigSource::File => from.to_owned(),
        ConfigSource::Environment => format!("environment: {from}"),
        ConfigSource::Flag => format!("flag: {from}"),
    }
}

/// Reads a file as fcd would, and lists what differs from the running daemon if that is reachable.
fn check(
    connector: &mut Connector,
    printer: &mut Printer,
    env: &Env,
    file: Option<PathBuf>,
) -> Result<u8> {
    let uid = rustix::process::geteuid().as_raw();
    let flags = Flags {
        config: file,
        ..Flags::default()
    };
    let config = Config::load(&flags, uid, &|name| env(name))?;
    let path = config.origins.file.clone();
    // `state_dir` and `socket` may come from flags or variables of the daemon that fcctl cannot
    // see, so they are not compared.
    let differs: Vec<String> = match running(connector, printer) {
        Ok(values) => config
            .effective()
            .into_iter()
            .filter(|ours| !matches!(ours.key.as_str(), "state_dir" | "socket"))
            .filter(|ours| {
                values
                    .iter()
                    .any(|v| v.key == ours.key && v.value != ours.value)
            })
            .map(|ours| ours.key)
            .collect(),
        Err(_) => Vec::new(),
    };
    if printer.json {
        printer.document(&serde_json::json!({ "file": path, "differs": differs }))?;
        return Ok(0);
    }
    let text = match &path {
        Some(path) => format!("{}: ok", path.display()),
        None => format!(
            "{} does not exist: every setting has its default",
            Places::for_user(uid, &|name| env(name)).config.display()
        ),
    };
    printer.line(&printable(&text))?;
    if !differs.is_empty() {
        printer.note(&format!(
            "the running daemon has other values until it is restarted: {}",
            differs.join(", ")
        ));
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;
    use crate::client::fake::Fake;
    use expect_test::expect;
    use serde_json::json;

    fn daemon() -> Fake {
        Fake::start(|r| {
            r.result(json!({"values": [
                {"key": "socket", "value": "\"/s\"", "source": "environment", "from": "FCD_SOCKET"},
                {"key": "state_dir", "value": "\"/d\"", "source": "flag", "from": "--state-dir"},
                {"key": "vm.vcpus", "value": "2", "source": "file", "from": "/etc/fcd/config.toml"},
                {"key": "vm.mem_mib", "value": "1024", "source": "default"},
            ]}));
        })
    }

    #[test]
    fn settings_are_shown_with_their_sources() {
        check(
            &daemon(),
            &["config", "show"],
            expect![[r#"
                > fcd.config {}
                SETTING     VALUE  SOURCE
                socket      "/s"   environment: FCD_SOCKET
                state_dir   "/d"   flag: --state-dir
                vm.vcpus    2      /etc/fcd/config.toml
                vm.mem_mib  1024   default
                status 0
            "#]],
        );
        check(
            &daemon(),
            &["config", "show", "--changed", "--json"],
            expect![[r#"
                > fcd.config {}
                [
                  {
                    "key": "socket",
                    "value": "\"/s\"",
                    "source": "environment",
                    "from": "FCD_SOCKET"
                  },
                  {
                    "key": "state_dir",
                    "value": "\"/d\"",
                    "source": "flag",
                    "from": "--state-dir"
                  },
                  {
                    "key": "vm.vcpus",
                    "value": "2",
                    "source": "file",
                    "from": "/etc/fcd/config.toml"
                  }
                ]
                status 0
            "#]],
        );
    }

    #[test]
    fn file_is_checked_and_compared() {
        let fake = daemon();
        let file = |text: &str| {
            let path = fake.dir().join("config.toml");
            std::fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        check(
            &fake,
            &["config", "check", &file("[vm]\nvcpus = 3\n")],
            expect![[r#"
                > fcd.config {}
                DIR/config.toml: ok
                ! fcctl: the running daemon has other values until it is restarted: vm.vcpus
                status 0
            "#]],
        );
        check(
            &fake,
            &["config", "check", &file("[vm]\nvcpu = 3\n")],
            expect![[r#"
                ! fcctl: read configuration DIR/config.toml: line 2: unknown field `vcpu`, expected one of `image`, `vcpus`, `mem_mib`
                ! hint: correct or remove that line
                status 2
            "#]],
        );
        check(
            &fake,
            &["config", "check", "/nonexistent/x"],
            expect![[r#"
                ! fcctl: read configuration /nonexistent/x: No such file or directory (os error 2)
                ! hint: name a file that can be read with --config or FCD_CONFIG, or leave both out
                status 2
            "#]],
        );
    }
}
