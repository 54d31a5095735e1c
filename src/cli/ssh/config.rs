//! `ssh-config`: prints a configuration with which plain ssh and the programs that use it reach
//! VMs.
//!
//! The port of a VM in user mode changes at each start, so ssh connects through `fcctl ssh-proxy`,
//! which asks the daemon for the current one. Address and port are printed too, for programs that
//! cannot run a command.

use super::block;
use super::keys::KeyFiles;
use super::user;
use crate::api::vm::{
    SshConfigReply, SshConfigRequest, VmListBrief, VmListRequest, VmSshConfig, VmState,
};
use crate::cli::context::Context;
use crate::cli::printer::Printer;
use crate::cli::signals::Interrupts;
use crate::client::{Client, Result};
use crate::error::{Error, Kind};
use crate::host::shell::quote;
use crate::host::text::quoted;
use serde::Serialize;
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug)]
pub(in crate::cli) struct Args {
    /// Names, IDs, or ID prefixes [default: all running VMs]
    #[arg(value_name = "VM")]
    vms: Vec<String>,
    /// Log in as this user of the guest [default: the VM's, or root]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
}

/// The `--json` output for a VM.
#[derive(Serialize)]
struct Entry {
    host: String,
    host_name: String,
    port: u16,
    user: String,
    identity_file: PathBuf,
    user_known_hosts_file: PathBuf,
    proxy_command: String,
}

pub(in crate::cli) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        signals,
        env,
        ..
    } = ctx;
    let fcctl = std::env::current_exe().map_err(|e| Error::io("find fcctl", e))?;
    let socket = std::path::absolute(connector.socket())
        .map_err(|e| Error::io("find the daemon's socket", e))?;
    let vms = if args.vms.is_empty() {
        running(&mut connector.connect(printer)?)?
    } else {
        args.vms
    };
    if vms.is_empty() {
        printer.note("no VM is running");
    }
    let user = args.user;
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    connector.for_each(printer, &vms, |printer, client, vm| {
        let config = client.call::<VmSshConfig>(&SshConfigRequest {
            vm: vm.to_owned(),
            user: user.clone(),
        })?;
        // A guest runtime accepts any number as a user.
        if let Some(user) = &user
            && (config.user == *user || user.parse::<u32>().is_err())
        {
            user::require(client, vm, user, interrupts.cancel())?;
        }
        let files = KeyFiles::lasting(&**env, &socket, &config)?;
        files.write(&config)?;
        let proxy = proxy_command(&fcctl, &socket, files.dir(), &config)?;
        print(printer, &config, &files, user.as_deref(), &proxy)?;
        Ok(Entry {
            host: config.name.to_string(),
            host_name: config.addr.ip().to_string(),
            port: config.addr.port(),
            user: config.user,
            identity_file: files.key(),
            user_known_hosts_file: files.known_hosts(),
            proxy_command: proxy,
        })
    })
}

fn running(client: &mut Client) -> Result<Vec<String>> {
    let vms = client.list::<VmListBrief>(VmListRequest {
        brief: true,
        ..Default::default()
    })?;
    let is_up = vms.iter().filter(|vm| vm.state == VmState::Running);
    Ok(is_up.map(|vm| vm.name.to_string()).collect())
}

fn print(
    printer: &mut Printer,
    config: &SshConfigReply,
    files: &KeyFiles,
    user: Option<&str>,
    proxy: &str,
) -> Result<()> {
    let block = block::render(config, files, user)?;
    // The text may be appended to a file whose last line has no end.
    printer.say(&format!(
        "\n# From fcctl ssh-config. It stays valid when the VM starts again.\n{block}  ProxyCommand {proxy}"
    ))
}

/// Returns the value of ProxyCommand, which ssh expands and then passes to a shell.
fn proxy_command(
    fcctl: &Path,
    socket: &Path,
    keys: &Path,
    config: &SshConfigReply,
) -> Result<String> {
    let word = |path: &Path| {
        let text = path.to_str().filter(|t| !t.contains(char::is_control));
        text.map(quote).ok_or_else(|| {
            Error::new(
                Kind::Unsupported,
                format!(
                    "ssh's configuration cannot contain the path {}",
                    quoted(&path.to_string_lossy())
                ),
            )
            .hint("use a path of printable characters")
        })
    };
    let (fcctl, socket, keys, vm) = (word(fcctl)?, word(socket)?, word(keys)?, &config.name);
    // Name the directory of the keys, because ssh may run in another environment than this process.
    let line = format!("{fcctl} --socket {socket} ssh-proxy --keys {keys} {vm}");
    Ok(line.replace('%', "%%"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;
    use crate::cli::tests::{check, fcctl, vm};
    use crate::client::fake::Fake;
    use expect_test::expect;
    use serde_json::json;

    fn with_ssh() -> Fake {
        Fake::start(|r| match r.method.as_str() {
            "vm.list" => {
                r.result(json!({"vms": [vm("web", VmState::Running), vm("db", VmState::Starting)]}))
            }
            _ => r.result(config("/root/x")),
        })
    }

    #[test]
    fn proxy_command_survives_ssh_and_the_shell() {
        let config = config("/root/x");
        let line =
            |fcctl: &str| proxy_command(fcctl.as_ref(), "/it's".as_ref(), "/k".as_ref(), &config);
        assert_eq!(
            line("/o pt/50%/fcctl").unwrap(),
            r"'/o pt/50%%/fcctl' --socket '/it'\''s' ssh-proxy --keys /k web"
        );
        let bad = line("/a\nb");
        assert!(bad.unwrap_err().is(Kind::Unsupported));
    }

    #[test]
    fn ssh_config_prints_running_vms_and_writes_their_keys() {
        use std::os::unix::fs::PermissionsExt;
        let fake = with_ssh();
        let ran = fcctl(&fake, &["ssh-config"]);
        assert_eq!((ran.status, ran.err.as_str()), (0, ""));
        assert_eq!(fake.methods(), "vm.list vm.ssh_config");
        let exe = std::env::current_exe().unwrap();
        let hash = hash_of(&fake);
        let out = String::from_utf8(ran.out).unwrap();
        let out = out
            .replace(&quote(exe.to_str().unwrap()), "FCCTL")
            .replace(fake.dir().to_str().unwrap(), "DIR")
            .replace(&hash, "HASH");
        expect![[r#"

            # From fcctl ssh-config. It stays valid when the VM starts again.
            Host web
              HostName 127.0.0.1
              Port 2222
              User root
              HostKeyAlias web
              IdentityFile "DIR/fcctl/ssh/HASH/web/key"
              IdentitiesOnly yes
              ForwardAgent no
              UserKnownHostsFile "DIR/fcctl/ssh/HASH/web/known_hosts"
              GlobalKnownHostsFile /dev/null
              StrictHostKeyChecking yes
              UpdateHostKeys no
              PasswordAuthentication no
              KbdInteractiveAuthentication no
              ProxyCommand FCCTL --socket DIR/fcd.sock ssh-proxy --keys DIR/fcctl/ssh/HASH/web web
        "#]]
        .assert_eq(&out);
        let key = fake.dir().join(format!("fcctl/ssh/{hash}/web/key"));
        assert_eq!(std::fs::read(&key).unwrap(), b"KEY\n");
        let mode = std::fs::metadata(&key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    fn hash_of(fake: &Fake) -> String {
        let dirs = std::fs::read_dir(fake.dir().join("fcctl/ssh")).unwrap();
        let names: Vec<_> = dirs.map(|d| d.unwrap().file_name()).collect();
        assert_eq!(names.len(), 1);
        names[0].to_str().unwrap().to_owned()
    }

    #[test]
    fn ssh_config_json_names_the_files() {
        let fake = with_ssh();
        let ran = fcctl(&fake, &["--json", "ssh-config", "web", "-u", "7"]);
        assert_eq!((ran.status, ran.err.as_str()), (0, ""));
        let entry: serde_json::Value = serde_json::from_slice(&ran.out).unwrap();
        assert_eq!(
            (&entry["host"], &entry["port"], &entry["user"]),
            (&json!("web"), &json!(2222), &json!("root"))
        );
        assert_eq!(fake.calls(), [r#"vm.ssh_config {"user":"7","vm":"web"}"#]);
    }

    #[test]
    fn ssh_config_without_running_vms_prints_nothing() {
        check(
            &Fake::start(|r| r.result(json!({"vms": []}))),
            &["ssh-config"],
            expect![[r#"
                > vm.list {"all":false,"brief":true}
                ! fcctl: no VM is running
                status 0
            "#]],
        );
    }
}
