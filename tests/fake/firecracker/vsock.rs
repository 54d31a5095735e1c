//! The vsock device.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

/// Listens on the socket `path` and serves vsock connections. The guest echoes on port 7 and stays
/// silent on port 8. Nothing listens on other ports.
pub fn listen_for_vsock(path: &str) -> std::io::Result<()> {
    let listener = UnixListener::bind(path)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer_vsock(stream));
        }
    });
    Ok(())
}

fn answer_vsock(mut stream: UnixStream) {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        if !matches!(stream.read(&mut byte), Ok(1)) {
            return;
        }
        line.push(byte[0]);
    }
    match line.as_slice() {
        b"CONNECT 7\n" => {
            let _ = stream.write_all(b"OK 1073741824\n");
            let mut from = stream.try_clone().unwrap();
            let _ = std::io::copy(&mut from, &mut stream);
        }
        b"CONNECT 8\n" => drop(stream.read(&mut [0])),
        _ => {}
    }
}
