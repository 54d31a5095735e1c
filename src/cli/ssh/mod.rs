//! `ssh`: the system's ssh with a configuration made for one VM. `ssh-config` prints one that lasts
//! (`config.rs`), for other programs.

pub(super) mod agent;
mod block;
pub(super) mod config;
mod keys;
pub(super) mod proxy;
mod user;

use super::context::Context;
use super::signals::Interrupts;
use crate::api::vm::{SshConfigReply, SshConfigRequest, VmSshConfig};
use crate::client::{Failure, Result};
use crate::error::{Error, Kind};
use crate::host::shell::quote;
use agent::Agent;
use keys::{KeyFiles, write_private};
use std::ffi::OsString;

/// The exit status of ssh if ssh itself fails, for example because a login is refused.
const SSH_FAILED: u8 = 255;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name, ID, or ID prefix
    vm: String,
    /// Log in as this user of the guest [default: the VM's, or root]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Allocate a terminal for a command; a shell has one anyway
    #[arg(short, long)]
    tty: bool,
    /// Let programs in the guest use your ssh-agent. Root in the guest can then use its keys, too
    #[arg(long)]
    ssh_agent: bool,
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
        env,
        ..
    } = ctx;
    let local_agent = args.ssh_agent.then(|| agent::socket(env)).transpose()?;
    if local_agent.is_some() && has_options(&args.args) {
        return Err(
            Error::invalid("--ssh-agent needs a command, not options for ssh")
                .hint("use ssh itself: fcctl ssh-config >> ~/.ssh/config, then ssh -A")
                .into(),
        );
    }
    let mut client = connector.connect(printer)?;
    let config = client.call::<VmSshConfig>(&SshConfigRequest {
        vm: args.vm.clone(),
        user: args.user.clone(),
    })?;
    // The directory has mode 0700, so only this user can read the key in it. It is removed when
    // dropped.
    let dir = tempfile::Builder::new()
        .prefix("fcctl-ssh-")
        .tempdir()
        .map_err(|e| Error::io("create a directory for ssh", e))?;
    let files = KeyFiles::in_dir(dir.path());
    files.write(&config)?;
    let file = dir.path().join("config");
    // ssh owns the terminal and handles its signals. This process must not exit first and leave the
    // key behind.
    let interrupts = Interrupts::start(signals, &stdio.stderr)?;
    let agent = local_agent
        .map(|local| Agent::forward(&mut client, &args.vm, &local, interrupts.cancel()))
        .transpose()?;
    let setting = agent.as_ref().map(Agent::setting).unwrap_or_default();
    let first = [&read_variables(&config), setting.as_str()].concat();
    let shell = args.args.is_empty().then_some(first.as_str());
    let text = render(&config, &files, args.user.as_deref(), shell)?;
    write_private(&file, &text)?;
    let mut argv: Vec<OsString> = vec!["-F".into(), file.into()];
    argv.extend(args.tty.then(|| "-t".into()));
    argv.push(config.name.as_str().into());
    if shell.is_none() && !has_options(&args.args) {
        let first = [first, enter(&config)].concat();
        argv.extend((!first.is_empty()).then(|| first.into()));
    }
    argv.extend(args.args);
    let ran = crate::host::interactive::run("ssh", &argv, interrupts.cancel()).map_err(|e| {
        let is_missing = e.kind() == Kind::CommandMissing;
        let failure = Failure::from(e);
        if is_missing {
            failure.hint("apt install openssh-client, or use fcctl exec")
        } else {
            failure
        }
    });
    if let (Ok(SSH_FAILED), Some(name)) = (&ran, &args.user) {
        user::require(&mut client, &args.vm, name, interrupts.cancel())?;
    }
    ran
}

/// Returns shell commands that read the VM's variables from a file in the guest. The values must
/// not be in a command line, because other users of this host can see it.
fn read_variables(config: &SshConfigReply) -> String {
    let file = config.env_file.as_ref().map(|file| quote(file));
    file.map_or_else(String::new, |file| format!("[ ! -r {file} ] || . {file}; "))
}

/// Returns a shell command that changes to the VM's working directory.
fn enter(config: &SshConfigReply) -> String {
    config.workdir.as_ref().map_or_else(String::new, |dir| {
        format!("cd {} 2>/dev/null; ", quote(dir))
    })
}

/// True if the words after the VM begin with an option of ssh.
fn has_options(args: &[OsString]) -> bool {
    let first = args.first();
    first.is_some_and(|word| word.as_encoded_bytes().starts_with(b"-"))
}

/// Renders the configuration of one session, independent of the user's own configuration. `shell`
/// is the setup before a login shell, or `None` if a command is given.
fn render(
    config: &SshConfigReply,
    files: &KeyFiles,
    user: Option<&str>,
    shell: Option<&str>,
) -> Result<String> {
    let mut text = block::render(config, files, user)?;
    text.push_str(
        "  IdentityAgent none\n  ControlMaster no\n  ControlPath none\n  LogLevel ERROR\n",
    );
    // A login shell starts in the workspace. For ssh, changing the directory is a command, and a
    // command gets no terminal unless one is requested; `yes` requests one if stdin is a terminal.
    // ssh expands `%`. A name with control characters cannot be written on one line.
    let workdir = config
        .workdir
        .as_ref()
        .filter(|w| !w.contains(char::is_control));
    let begin = shell.map(|setting| match workdir {
        Some(dir) => format!("{setting} cd '{}' 2>/dev/null;", dir.replace('\'', r"'\''")),
        None => setting.to_owned(),
    });
    if let Some(begin) = begin.filter(|begin| !begin.is_empty()) {
        let begin = begin.trim_start().replace('%', "%%");
        text.push_str(&format!(
            "  RequestTTY yes\n  RemoteCommand {begin} exec \"${{SHELL:-/bin/sh}}\" -l\n"
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    pub(super) fn config(workdir: &str) -> SshConfigReply {
        SshConfigReply {
            vm: "0123456789ab".parse().unwrap(),
            name: "web".parse().unwrap(),
            addr: "127.0.0.1:2222".parse().unwrap(),
            user: "root".to_owned(),
            private_key: "KEY".to_owned(),
            host_key: "ssh-ed25519 AAAA".to_owned(),
            workdir: Some(workdir.to_owned()),
            env_file: None,
        }
    }

    fn rendered(dir: &str, workdir: &str, shell: Option<&str>) -> String {
        let files = KeyFiles::in_dir(dir.as_ref());
        render(&config(workdir), &files, Some("dev"), shell).unwrap()
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
              ForwardAgent no
              UserKnownHostsFile "/tmp/d/known_hosts"
              GlobalKnownHostsFile /dev/null
              StrictHostKeyChecking yes
              UpdateHostKeys no
              PasswordAuthentication no
              KbdInteractiveAuthentication no
              SetEnv FCD_USER=dev
              IdentityAgent none
              ControlMaster no
              ControlPath none
              LogLevel ERROR
              RequestTTY yes
              RemoteCommand cd '/root/it'\''s 5%%' 2>/dev/null; exec "${SHELL:-/bin/sh}" -l
        "#]]
        .assert_eq(&rendered("/tmp/d", "/root/it's 5%", Some("")));
        for (workdir, shell) in [("/root/x", None), ("/root/x\nProxyCommand evil", Some(""))] {
            assert!(!rendered("/tmp/d", workdir, shell).contains("RemoteCommand"));
        }
        for (workdir, commands) in [
            ("/root/x", "A=b; cd '/root/x' 2>/dev/null;"),
            ("\n", "A=b;"),
        ] {
            let line = format!("  RequestTTY yes\n  RemoteCommand {commands} exec ");
            let text = rendered("/tmp/d", workdir, Some("A=b;"));
            assert!(text.contains(&line), "{text}");
        }
    }

    /// Checks the file with ssh itself: `ssh -G` prints the configuration that ssh would use.
    #[test]
    fn ssh_config_is_accepted_by_ssh() {
        let dir = tempfile::tempdir().unwrap();
        let (file, odd) = (dir.path().join("config"), dir.path().join("a b 5%"));
        let text = rendered(odd.to_str().unwrap(), "/root/a b", Some(""));
        std::fs::write(&file, text).unwrap();
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
