//! A registry on loopback that can stop in the middle of a blob, and that records its requests.

// This lock belongs to the tests, so it is not part of the daemon's lock order.
#![allow(clippy::disallowed_types)]

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// The longest time that a connection is held.
const HOLD: Duration = Duration::from_secs(120);
const PIECE: usize = 64 << 10;

#[derive(Default)]
struct State {
    /// Media type and content, by path.
    files: HashMap<String, (String, Vec<u8>)>,
    /// The byte at which sending a blob stops, by digest.
    stops: HashMap<String, usize>,
    /// The blobs that were requested, each with the first requested byte.
    asked: Vec<(String, usize)>,
}

pub struct Registry {
    pub address: String,
    state: Arc<(Mutex<State>, Condvar)>,
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// Returns a layer with one file of incompressible content.
pub fn layer(name: &str, bytes: usize) -> Vec<u8> {
    let mut state = name.bytes().fold(0x9e37_79b9_7f4a_7c15u64, |s, b| {
        (s ^ u64::from(b)).wrapping_mul(0x100_0000_01b3) | 1
    });
    let mut content = Vec::with_capacity(bytes + 8);
    while content.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        content.extend_from_slice(&state.to_le_bytes());
    }
    content.truncate(bytes);
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(bytes as u64);
    header.set_mtime(1_700_000_000);
    tar.append_data(&mut header, name, &content[..]).unwrap();
    tar.into_inner().unwrap()
}

impl Registry {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let shared = state.clone();
        // The thread ends with the test's process.
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || {
                    let _ = serve(&connection, &shared);
                });
            }
        });
        Self { address, state }
    }

    /// Publishes an image whose layers are not compressed. Returns its name.
    pub fn publish(&self, repository: &str, layers: &[Vec<u8>]) -> String {
        self.publish_with(repository, layers, json!({}))
    }

    pub fn publish_with(&self, repository: &str, layers: &[Vec<u8>], config: Value) -> String {
        let mut state = self.state.0.lock().unwrap();
        let mut put = |kind: &str, bytes: &[u8], media_type: &str| {
            let media_type = format!("application/vnd.oci.image.{media_type}");
            let digest = digest(bytes);
            for name in [digest.as_str(), "1"] {
                if name != "1" || kind == "manifests" {
                    let path = format!("/v2/{repository}/{kind}/{name}");
                    let file = (media_type.clone(), bytes.to_vec());
                    state.files.insert(path, file);
                }
            }
            json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
        };
        let described: Vec<Value> = layers
            .iter()
            .map(|layer| put("blobs", layer, "layer.v1.tar"))
            .collect();
        let diff_ids: Vec<&Value> = described.iter().map(|layer| &layer["digest"]).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = put("blobs", config.to_string().as_bytes(), "config.v1+json");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": described,
        });
        put(
            "manifests",
            manifest.to_string().as_bytes(),
            "manifest.v1+json",
        );
        format!("{}/{repository}:1", self.address)
    }

    /// Makes connections stop before this byte of a blob, until [`Self::stop_nowhere`].
    pub fn stop_at(&self, digest: &str, byte: usize) {
        let mut state = self.state.0.lock().unwrap();
        state.stops.insert(digest.to_owned(), byte);
    }

    pub fn stop_nowhere(&self) {
        self.state.0.lock().unwrap().stops.clear();
        self.state.1.notify_all();
    }

    /// Returns the first byte of each request for a blob since the last call.
    pub fn asked(&self, digest: &str) -> Vec<usize> {
        let mut state = self.state.0.lock().unwrap();
        let (of_it, others): (Vec<_>, Vec<_>) = std::mem::take(&mut state.asked)
            .into_iter()
            .partition(|(asked, _)| asked == digest);
        state.asked = others;
        of_it.into_iter().map(|(_, from)| from).collect()
    }
}

/// Answers one request.
fn serve(connection: &TcpStream, shared: &(Mutex<State>, Condvar)) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut from = 0;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            from = range.trim_end_matches('-').parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    let name = path.rsplit('/').next().unwrap_or_default().to_owned();
    let mut state = shared.0.lock().unwrap();
    let Some((media_type, bytes)) = state.files.get(&path).cloned() else {
        drop(state);
        let status = if path == "/v2/" {
            "200 OK"
        } else {
            "404 Not Found"
        };
        return write!(
            &*connection,
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
    };
    state.asked.push((name.clone(), from));
    drop(state);
    let rest = &bytes[from..];
    let status = if from > 0 {
        "206 Partial Content"
    } else {
        "200 OK"
    };
    write!(
        &*connection,
        "HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\n\
         Content-Range: bytes {from}-{}/{}\r\nConnection: close\r\n\r\n",
        rest.len(),
        bytes.len() - 1,
        bytes.len()
    )?;
    let mut at = from;
    while at < bytes.len() {
        let mut state = shared.0.lock().unwrap();
        let stop = loop {
            match state.stops.get(&name) {
                Some(stop) if *stop <= at => {}
                stop => break stop.copied().unwrap_or(usize::MAX),
            }
            let (next, waited) = shared.1.wait_timeout(state, HOLD).unwrap();
            if waited.timed_out() {
                return Ok(());
            }
            state = next;
        };
        drop(state);
        let end = (at + PIECE).min(bytes.len()).min(stop);
        (&*connection).write_all(&bytes[at..end])?;
        at = end;
    }
    Ok(())
}
