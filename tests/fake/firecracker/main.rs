//! A fake Firecracker v1.16.1. Replies, phases and quirks of the API follow recorded transcripts of
//! the real program. There is no guest: a guest that "runs" prints one line on its serial console.
//!
//! The fake reads the file `script` next to its executable. Each line `METHOD PATH FAULT
//! [ARGUMENT]` selects a fault for one kind of request. The fake writes all received requests to
//! the file `requests`. Faults are `hang`, `die`, `garbage`, `hangup`, `slow` with milliseconds,
//! and `refuse` with a message. A line `KEYBOARD` makes the guest shut down at Ctrl-Alt-Del.
//! `VERSION` with a number sets the version. `EXIT` with a text makes the fake print the text and
//! exit immediately.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod http;
mod vmm;
mod vsock;

use http::{PAYLOAD_BYTES_MAX, read_request, respond};
use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmm::Vmm;

/// Returns the fault for this request and the fault's argument, or `None` if the script has no
/// fault for it.
fn fault(program_dir: &Path, method: &str, path: &str) -> Option<(String, String)> {
    let script = std::fs::read_to_string(program_dir.join("script")).unwrap_or_default();
    script.lines().find_map(|line| {
        let mut words = line.splitn(4, ' ');
        let is_it = words.next() == Some(method) && words.next() == Some(path);
        is_it.then(|| {
            (
                words.next().unwrap_or_default().to_owned(),
                words.next().unwrap_or_default().to_owned(),
            )
        })
    })
}

fn serve(mut stream: UnixStream, vmm: &Mutex<Vmm>, program_dir: &Path) {
    let mut buffer = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut buffer) {
        let request = match request {
            Ok(request) => request,
            Err(length) => {
                let what = format!(
                    "Request payload with size {length} is larger than the limit of {PAYLOAD_BYTES_MAX} allowed by server."
                );
                return respond(
                    &mut stream,
                    &Err(format!(
                        "{what}\nAll previous unanswered requests will be dropped."
                    )),
                );
            }
        };
        let mut vmm = vmm.lock().unwrap();
        let line = format!(
            "{} {} {}\n",
            request.method,
            request.path,
            String::from_utf8_lossy(&request.body)
        );
        let log = File::options()
            .create(true)
            .append(true)
            .open(program_dir.join("requests"));
        log.and_then(|mut log| log.write_all(line.as_bytes()))
            .unwrap();
        let outcome = match fault(program_dir, &request.method, &request.path) {
            Some((what, argument)) => match what.as_str() {
                "hang" => loop {
                    std::thread::park();
                },
                "die" => std::process::abort(),
                "hangup" => return,
                "garbage" => {
                    let _ = stream.write_all(b"\xff\x00 no HTTP at all\r\n\r\n");
                    continue;
                }
                "refuse" => Err(argument),
                _ => {
                    std::thread::sleep(Duration::from_millis(argument.parse().unwrap_or(0)));
                    vmm.handle(&request.method, &request.path, &request.body)
                }
            },
            None if !["GET", "PUT", "PATCH", "DELETE"].contains(&request.method.as_str()) => {
                Err("Invalid HTTP Method: Unsupported HTTP method.\nAll previous unanswered requests will be dropped.".to_owned())
            }
            None => vmm.handle(&request.method, &request.path, &request.body),
        };
        let is_ending = vmm.is_ending();
        drop(vmm);
        respond(&mut stream, &outcome);
        if is_ending {
            std::process::exit(i32::from(outcome.is_err()));
        }
    }
}

fn main() {
    let program_dir = std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned();
    let script = std::fs::read_to_string(program_dir.join("script")).unwrap_or_default();
    let said = |word: &str| {
        script
            .lines()
            .find_map(|line| line.strip_prefix(word).map(|rest| rest.trim().to_owned()))
    };
    let version = said("VERSION").unwrap_or_else(|| "1.16.1".to_owned());
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        args.iter()
            .position(|a| a == name)
            .and_then(|i| args.get(i + 1))
            .cloned()
    };
    if args.iter().any(|a| a == "--version") {
        println!("Firecracker v{version}\n");
        return;
    }
    if let Some(what) = said("EXIT") {
        eprintln!("{what}");
        std::process::exit(1);
    }
    let socket = value("--api-sock").unwrap_or_else(|| "/run/firecracker.socket".to_owned());
    let Ok(listener) = UnixListener::bind(&socket) else {
        eprintln!("Failed to open the API socket at: {socket}. Check that it is not already used.");
        std::process::exit(1);
    };
    let id = value("--id").unwrap_or_else(|| "anonymous-instance".to_owned());
    let vmm = Vmm::new(id, version, said("KEYBOARD").is_some());
    let vmm = Arc::new(Mutex::new(vmm));
    for stream in listener.incoming().flatten() {
        let (vmm, program_dir) = (vmm.clone(), program_dir.clone());
        std::thread::spawn(move || serve(stream, &vmm, &program_dir));
    }
}
