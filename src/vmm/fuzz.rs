//! Fuzz targets of `scripts/fuzz` for the parsers of data from a VMM.
//!
//! An input stands for the data that a VMM might send if a guest controls it. A target panics when
//! it finds a fault: an exceeded limit, text that could reach a terminal unescaped, or a result
//! that depends on how the bytes were split into reads.

use super::console::whole_characters;
use super::firecracker::api::{BalloonStatistics, Instance};
use super::firecracker::incoming::{self as http, Answer};
use super::firecracker::{metrics, refusal};
use super::qemu::forward;
use super::qemu::incoming::{self as qmp, Message};

/// The maximum number of bytes that a driver reads at once.
const READ_BYTES_MAX: usize = 4096;
/// The maximum length of an error's text, which must fit into one line of a log or a terminal.
const TEXT_CHARS_MAX: usize = 4096;

/// Parses messages of QEMU's monitor.
pub fn qmp(input: &[u8]) {
    let whole = read_qmp(input, READ_BYTES_MAX);
    assert_eq!(
        whole,
        read_qmp(input, small_piece(input)),
        "the result depends on the pieces"
    );
    for message in &whole.0 {
        let _ = message.shutdown_cause();
        if let Some(refusal) = &message.error {
            check_text(&refusal.text("ask the VMM"));
        }
        if let Some(text) = message.answer.as_ref().and_then(|answer| answer.as_str()) {
            let _ = forward::parse(text);
        }
    }
}

/// Returns the messages, and whether all bytes were valid QMP.
fn read_qmp(input: &[u8], piece: usize) -> (Vec<Message>, bool) {
    let (mut incoming, mut messages) = (qmp::Incoming::default(), Vec::new());
    for bytes in input.chunks(piece) {
        incoming.push(bytes);
        loop {
            match incoming.message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(_) => return (messages, false),
            }
        }
        assert!(
            incoming.buffered() <= qmp::LINE_BYTES_MAX,
            "{} bytes are buffered",
            incoming.buffered()
        );
    }
    (messages, true)
}

/// Parses answers of Firecracker's API server.
pub fn firecracker_http(input: &[u8]) {
    let whole = read_http(input, READ_BYTES_MAX);
    assert_eq!(
        whole,
        read_http(input, small_piece(input)),
        "the result depends on the pieces"
    );
    for answer in &whole.0 {
        assert!(
            answer.body.len() <= http::BODY_BYTES_MAX && http::STATUSES.contains(&answer.status),
            "{answer:?}"
        );
        let _ = serde_json::from_slice::<Instance>(&answer.body);
        let _ = serde_json::from_slice::<BalloonStatistics>(&answer.body);
        check_text(&refusal::refused("ask the VMM", answer.status, &answer.body).to_string());
    }
}

/// Returns the answers, and whether all bytes were valid HTTP.
fn read_http(input: &[u8], piece: usize) -> (Vec<Answer>, bool) {
    let (mut incoming, mut answers) = (http::Incoming::default(), Vec::new());
    for bytes in input.chunks(piece) {
        incoming.push(bytes);
        loop {
            match incoming.answer() {
                Ok(Some(answer)) => answers.push(answer),
                Ok(None) => break,
                Err(why) => {
                    check_text(&why);
                    return (answers, false);
                }
            }
        }
        let buffered = incoming.buffered();
        assert!(
            buffered <= http::HEAD_BYTES_MAX + http::BODY_BYTES_MAX + READ_BYTES_MAX,
            "{buffered} bytes are buffered"
        );
    }
    (answers, true)
}

/// Parses Firecracker's metrics.
pub fn firecracker_metrics(input: &[u8]) {
    let lines = input.split(|b| *b == b'\n').count();
    let all = metrics::parse(input).unwrap_or_default();
    assert!(all.len() <= lines && all.iter().all(serde_json::Value::is_object));
}

/// Splits the output of a console that is followed as text.
pub fn console(input: &[u8]) {
    let (mut text, mut partial) = (String::new(), Vec::new());
    for bytes in input.chunks(small_piece(input)) {
        let mut piece: Vec<u8> = std::mem::take(&mut partial);
        piece.extend_from_slice(bytes);
        partial = piece.split_off(whole_characters(&piece));
        assert!(partial.len() < 4, "{} bytes are buffered", partial.len());
        text.push_str(&String::from_utf8_lossy(&piece));
    }
    text.push_str(&String::from_utf8_lossy(&partial));
    assert_eq!(
        text,
        String::from_utf8_lossy(input),
        "the result depends on the pieces"
    );
}

/// Returns a small size that depends on the input.
fn small_piece(input: &[u8]) -> usize {
    1 + input.iter().fold(input.len(), |sum, b| {
        sum.wrapping_mul(31).wrapping_add(usize::from(*b))
    }) % 61
}

#[track_caller]
fn check_text(text: &str) {
    assert!(
        text.chars().count() <= TEXT_CHARS_MAX,
        "{} characters",
        text.chars().count()
    );
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsers_survive_truncated_and_mutated_conversations() {
        let qmp_seed = include_bytes!("../../tests/fuzz/seeds/qmp/boot");
        let http_seed = include_bytes!("../../tests/fuzz/seeds/firecracker-http/boot");
        for (target, seed) in [
            (qmp as fn(&[u8]), &qmp_seed[..]),
            (firecracker_http, &http_seed[..]),
        ] {
            for at in 0..seed.len() {
                target(&seed[at..]);
                let mut changed = seed.to_vec();
                changed[at] ^= 0x80;
                target(&changed);
            }
        }
        console("h\u{e9}llo \u{1f600}".as_bytes());
        console(b"\xf0\x9f\x98\xff\xc3");
        firecracker_metrics(b"{}\n7\n{\"a\":1}\n\xff");
    }
}
