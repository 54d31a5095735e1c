//! `ssh`: the system's ssh with a configuration made for one VM.

use super::context::Context;
use super::signals::Interrupts;
use crate::api::vm::{SshConfigReply, SshConfigRequest, VmSshConfig};
use crate::client::{Failure, Result};
use crate::error::{Error, Kind};
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name, ID, or ID prefix
    vm: String,
    /// Log in as this user of the guest [default: root]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// A command, or options for ssh such as -L 8080:localhost:80
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<OsString>,
}

pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        signals,
        ..
    } = ctx;
    let config = connector
        .connect(printer)?
        .call::<VmSshConfig>(&SshConfigRequest {
            vm: args.vm,
            user: args.user.clone(),
        })?;
    // The directory has mode 0700, so only this user can read the key in it. It is removed when
    // dropped.
    let dir = tempfile::Builder::new()
        .prefix("fcctl-ssh-")
        .tempdir()
        .map_err(|e| Error::io("create a directory for ssh", e))?;
    let io = |e| {
        Error::io(
            format!("write ssh's configuration to {}", dir.path().display()),
            e,
        )
    };
    write_private(&dir.path().join("key"), &with_newline(&config.private_key)).map_err(io)?;
    write_private(
        &dir.path().join("known_hosts"),
        &format!("{} {}\n", config.name, config.host_key),
    )
    .map_err(io)?;
    let file = dir.path().join("config");
    let mut text = render(&config, dir.path(), args.args.is_empty());
    if let Some(user) = &args.user {
        // The login shell of a guest runtime takes it. Other guests have logged in as the user.
        text.push_str(&format!("  SetEnv FCD_USER={user}\n"));
    }
    write_private(&file, &text).map_err(io)?;
    let mut argv: Vec<OsString> = vec!["-F".into(), file.into(), config.name.as_str().into()];
    argv.extend(args.args);
    // ssh owns the terminal and handles its signals. This process must not exit first and leave the
    // key behind.
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    crate::host::interactive::run("ssh", &argv, interrupts.cancel()).map_err(|e| {
        let is_missing = e.kind() == Kind::CommandMissing;
        let failure = Failure::from(e);
        if is_missing {
            failure.hint("apt install openssh-client, or use fcctl exec")
        } else {
            failure
        }
    })
}

/// OpenSSH rejects a private key without its last newline.
fn with_newline(key: &str) -> String {
    format!("{}\n", key.trim_end())
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?
        .write_all(text.as_bytes())
}

/// Renders an `ssh_config(5)` in which the VM's key and host key are the only ones.
fn render(config: &SshConfigReply, dir: &Path, is_shell: bool) -> String {
    let dir = dir.display();
    let mut text = format!(
        "Host {name}\n  HostName {ip}\n  Port {port}\n  User {user}\n  HostKeyAlias {name}\n  \
         IdentityFile \"{dir}/key\"\n  IdentitiesOnly yes\n  IdentityAgent none\n  ForwardAgent no\n  \
         UserKnownHostsFile \"{dir}/known_hosts\"\n  GlobalKnownHostsFile /dev/null\n  \
         StrictHostKeyChecking yes\n  UpdateHostKeys no\n  PasswordAuthentication no\n  KbdInteractiveAuthentication no\n  \
         ControlMaster no\n  ControlPath none\n  LogLevel ERROR\n",
        name = config.name,
        ip = config.addr.ip(),
        port = config.addr.port(),
        user = config.user,
    );
    // A login shell starts in the workspace. For ssh, changing the directory is a command, and a
    // command gets no terminal unless one is requested; `yes` requests one if stdin is a terminal.
    // ssh expands `%`. A name with control characters cannot be written on one line.
    if let Some(workdir) = config
        .workdir
        .as_ref()
        .filter(|w| is_shell && !w.contains(char::is_control))
    {
        let quoted = format!("'{}'", workdir.replace('\'', r"'\''")).replace('%', "%%");
        text.push_str(&format!("  RequestTTY yes\n  RemoteCommand cd {quoted} 2>/dev/null; exec \"${{SHELL:-/bin/sh}}\" -l\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn config(workdir: &str) -> SshConfigReply {
        SshConfigReply {
            vm: "0123456789ab".parse().unwrap(),
            name: "web".parse().unwrap(),
            addr: "127.0.0.1:2222".parse().unwrap(),
            user: "root".to_owned(),
            private_key: "KEY".to_owned(),
            host_key: "ssh-ed25519 AAAA".to_owned(),
            workdir: Some(workdir.to_owned()),
        }
    }

    #[test]
    fn ssh_config_has_only_the_vms_keys() {
        expect![[r#"
            Host web
              HostName 127.0.0.1
              Port 2222
              User root
              HostKeyAlias web
              IdentityFile "/tmp/d/key"
              IdentitiesOnly yes
              IdentityAgent none
              ForwardAgent no
              UserKnownHostsFile "/tmp/d/known_hosts"
              GlobalKnownHostsFile /dev/null
              StrictHostKeyChecking yes
              UpdateHostKeys no
              PasswordAuthentication no
              KbdInteractiveAuthentication no
              ControlMaster no
              ControlPath none
              LogLevel ERROR
              RequestTTY yes
              RemoteCommand cd '/root/it'\''s 5%%' 2>/dev/null; exec "${SHELL:-/bin/sh}" -l
        "#]]
        .assert_eq(&render(&config("/root/it's 5%"), Path::new("/tmp/d"), true));
        for (workdir, is_shell) in [("/root/x", false), ("/root/x\nProxyCommand evil", true)] {
            assert!(
                !render(&config(workdir), Path::new("/tmp/d"), is_shell).contains("RemoteCommand")
            );
        }
    }

    /// Checks the file with ssh itself: `ssh -G` prints the configuration that ssh would use.
    #[test]
    fn ssh_config_is_accepted_by_ssh() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config");
        write_private(&file, &render(&config("/root/a b"), dir.path(), true)).unwrap();
        let command = crate::host::Command::new("ssh")
            .arg("-G")
            .arg("-F")
            .arg(&file)
            .arg("web");
        let cancel = crate::locks::Cancel::try_new().unwrap();
        let out = crate::host::command::run_any_status(&command, &cancel, &mut |_| {}).unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert_eq!(out.status, 0, "{}", String::from_utf8_lossy(&out.stderr));
        for line in [
            "hostname 127.0.0.1",
            "port 2222",
            "stricthostkeychecking true",
            "requesttty true",
            "remotecommand cd '/root/a b' 2>/dev/null",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
