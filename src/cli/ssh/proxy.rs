//! `ssh-proxy`: relays stdin and stdout to a VM's SSH server. ssh runs it as its ProxyCommand.

use super::keys::{KeyFiles, Written};
use crate::api::vm::{SshConfigRequest, VmSshConfig};
use crate::cli::connect::{receive, send};
use crate::cli::context::Context;
use crate::client::Result;
use crate::error::{Error, Kind};
use crate::host::thread;
use std::net::{Shutdown, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

const CONNECT_DEADLINE: Duration = Duration::from_secs(20);

#[derive(clap::Args, Debug)]
pub(in crate::cli) struct Args {
    /// Directory of the VM's keys, as fcctl ssh-config made it
    #[arg(long, value_name = "DIR")]
    keys: PathBuf,
    /// Name, ID, or ID prefix
    vm: String,
}

pub(in crate::cli) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        ..
    } = ctx;
    let config = connector
        .connect(printer)?
        .call::<VmSshConfig>(&SshConfigRequest {
            vm: args.vm,
            // Only the address and the keys are used.
            user: Some("root".to_owned()),
        })?;
    if KeyFiles::in_dir(&args.keys).write(&config)? == Written::Changed {
        // ssh may have read the old keys already.
        let name = config.name;
        return Err(Error::new(
            Kind::HostKeyMismatch,
            format!("VM {name} has other keys than before, because it was created again"),
        )
        .hint("the new keys are in place: connect again")
        .into());
    }
    let doing = || format!("connect to {}", config.addr);
    let guest = TcpStream::connect_timeout(&config.addr, CONNECT_DEADLINE)
        .map_err(|e| Error::io(doing(), e))?;
    let to = guest.try_clone().map_err(|e| Error::io(doing(), e))?;
    let stdin = stdio.stdin.try_clone().map_err(|e| Error::io(doing(), e))?;
    // Never joined: ssh closes stdin only when it ends.
    thread::spawn("stdin", move || {
        send(stdin, &to);
        // Fails if the guest has hung up.
        let _ = to.shutdown(Shutdown::Write);
    })?;
    let stdout = stdio
        .stdout
        .try_clone()
        .map_err(|e| Error::io(doing(), e))?;
    receive(guest, stdout)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use crate::cli::tests::{Start, check, fcctl_from, file_with};
    use crate::client::fake::Fake;
    use expect_test::expect;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    #[test]
    fn proxy_relays_to_current_port_if_keys_are_known() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut reply = config("/root/x");
        reply.addr = listener.local_addr().unwrap();
        let fake = Fake::start(move |r| r.result(&reply));
        let keys = fake.dir().join("web");
        let args = ["ssh-proxy", "--keys", keys.to_str().unwrap(), "web"];
        check(
            &fake,
            &args,
            expect![[r#"
                > vm.ssh_config {"user":"root","vm":"web"}
                ! fcctl: VM web has other keys than before, because it was created again
                ! hint: the new keys are in place: connect again
                status 1
            "#]],
        );
        let guest = crate::host::thread::spawn("guest", move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            got.reverse();
            stream.write_all(&got).unwrap();
        });
        let sent: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
        let start = Start {
            stdin: file_with(&sent),
            ..Start::default()
        };
        let ran = fcctl_from(&fake, start, &args);
        guest.unwrap().join().unwrap();
        assert_eq!((ran.status, ran.err.as_str()), (0, ""));
        assert!(ran.out.iter().rev().eq(&sent));
    }
}
