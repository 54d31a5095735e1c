//! Tests of blobs: their sizes, connections that are cut, and resumption.

use super::*;
use std::io::Read;

const BYTES: &[u8] = b"0123456789abcdefghij";

fn fetch(fake: &Fake) -> Result<Vec<u8>> {
    let client = client(settings(&fake.name()));
    client.blob_bytes(&sha256(BYTES), BYTES.len() as u64, 100)
}

/// Answers a request for the bytes from `from` on with `bytes`.
fn rest(from: usize, bytes: &[u8]) -> Answer {
    let range = format!("bytes {from}-{}/{}", BYTES.len() - 1, BYTES.len());
    Answer::new(206)
        .header("Content-Range", &range)
        .cut(bytes, BYTES.len() - from)
}

#[test]
fn blob_is_read_and_verified() {
    for answer in [
        Answer::new(200).body(BYTES),
        Answer::new(200).chunked(BYTES),
    ] {
        let fake = Fake::start(move |_| answer.clone());
        assert_eq!(fetch(&fake).unwrap(), BYTES);
        let seen = fake.seen();
        assert_eq!(seen[0].path, format!("/v2/app/blobs/{}", sha256(BYTES)));
        assert_eq!(seen[0].header("range"), None);
    }
    let fake = Fake::start(|_| Answer::new(200));
    let empty = client(settings(&fake.name())).blob_bytes(&sha256(b""), 0, 0);
    assert_eq!(empty.unwrap(), b"");
}

#[test]
fn reader_does_not_verify_but_bytes_do() {
    let fake = Fake::start(|_| Answer::new(200).body(&[b'x'; BYTES.len()]));
    fails(fetch(&fake), Kind::RegistryInvalid);
    let client = client(settings(&fake.name()));
    let mut read = String::new();
    let mut blob = client.blob(&sha256(BYTES), BYTES.len() as u64, 0).unwrap();
    blob.read_to_string(&mut read).unwrap();
    assert_eq!(read, "x".repeat(BYTES.len()));
}

#[test]
fn cut_blob_is_resumed_with_range() {
    let fake = Fake::start(counted(vec![
        Answer::new(200).cut(&BYTES[..4], BYTES.len()),
        rest(4, &BYTES[4..11]),
        rest(11, &BYTES[11..]),
    ]));
    assert_eq!(fetch(&fake).unwrap(), BYTES);
    let ranges: Vec<_> = fake
        .seen()
        .iter()
        .map(|asked| asked.header("range").map(str::to_owned))
        .collect();
    assert_eq!(
        ranges,
        [None, Some("bytes=4-".into()), Some("bytes=11-".into())]
    );
}

#[test]
fn registry_without_ranges_sends_all_again() {
    let fake = Fake::start(counted(vec![
        Answer::new(200).cut(&BYTES[..7], BYTES.len()),
        Answer::new(200).cut(&BYTES[..3], BYTES.len()),
        Answer::new(200).body(BYTES),
    ]));
    assert_eq!(fetch(&fake).unwrap(), BYTES);
}

#[test]
fn short_partial_replies_are_continued() {
    let partial = |from: usize, to: usize| {
        Answer::new(206)
            .header("Content-Range", &format!("bytes {from}-{}/20", to - 1))
            .body(&BYTES[from..to])
    };
    let fake = Fake::start(counted(vec![
        Answer::new(200).cut(&BYTES[..4], BYTES.len()),
        partial(4, 9),
        partial(9, 20),
    ]));
    assert_eq!(fetch(&fake).unwrap(), BYTES);
}

#[test]
fn wrong_ranges_are_refused() {
    for (range, body) in [
        (Some("bytes 0-19/20"), BYTES),
        (Some("bytes 5-19/20"), &BYTES[5..]),
        (Some("bytes 4-19/21"), &BYTES[4..]),
        (Some("bytes 4-20/*"), &BYTES[4..]),
        (Some("bytes 4-19/20"), &BYTES[5..]),
        (Some("bytes x"), &BYTES[4..]),
        (None, &BYTES[4..]),
        (Some("bytes 0-18446744073709551615/*"), &BYTES[4..]),
    ] {
        let mut partial = Answer::new(206).body(body);
        if let Some(range) = range {
            partial = partial.header("Content-Range", range);
        }
        let first = Answer::new(200).cut(&BYTES[..4], BYTES.len());
        let fake = Fake::start(counted(vec![first, partial]));
        fails(fetch(&fake), Kind::RegistryInvalid);
    }
    // The client did not request a range.
    let fake = Fake::start(|_| rest(0, BYTES));
    fails(fetch(&fake), Kind::RegistryInvalid);
    let first = Answer::new(200).cut(&BYTES[..4], BYTES.len());
    let fake = Fake::start(counted(vec![first, Answer::new(416)]));
    fails(fetch(&fake), Kind::RegistryInvalid);
}

#[test]
fn lying_sizes_are_refused() {
    let longer = [BYTES, b"x"].concat();
    for (answer, kind) in [
        (Answer::new(200).body(&BYTES[1..]), Kind::RegistryInvalid),
        (Answer::new(200).body(&longer), Kind::RegistryInvalid),
        (Answer::new(200).chunked(&longer), Kind::RegistryInvalid),
        (Answer::new(200).endless(), Kind::RegistryInvalid),
        // Too few bytes look like a lost connection, so the client resumes a few times.
        (
            Answer::new(200).chunked(&BYTES[1..]),
            Kind::RegistryUnreachable,
        ),
    ] {
        let fake = Fake::start(move |_| answer.clone());
        fails(fetch(&fake), kind);
        assert!(fake.seen().len() <= 3);
    }
    let fake = Fake::start(|_| Answer::new(200));
    let result = client(settings(&fake.name())).blob_bytes(&sha256(BYTES), 101, 100);
    fails(result, Kind::RegistryInvalid);
    assert!(fake.seen().is_empty());
}

#[test]
fn endless_cuts_end() {
    let fake = Fake::start(|asked| match asked.header("range") {
        None => Answer::new(200).cut(&BYTES[..1], BYTES.len()),
        Some(range) => {
            let from: usize = range[6..range.len() - 1].parse().unwrap();
            rest(from, &BYTES[from..=from])
        }
    });
    fails(fetch(&fake), Kind::RegistryUnreachable);
    assert_eq!(fake.seen().len(), 3);
}

#[test]
fn registry_that_fails_while_resumed_is_asked_again() {
    let fake = Fake::start(counted(vec![
        Answer::new(200).cut(&BYTES[..4], BYTES.len()),
        Answer::new(503),
        rest(4, &BYTES[4..]),
    ]));
    assert_eq!(fetch(&fake).unwrap(), BYTES);
}

#[test]
fn storage_is_found_again_through_registry() {
    let storage = Fake::start(counted(vec![
        Answer::new(200).cut(&BYTES[..4], BYTES.len()),
        rest(4, &BYTES[4..]),
    ]));
    let to = storage.name();
    let registry = Fake::start(move |asked| {
        Answer::new(307).header("Location", &format!("http://{to}/x?sig={}", asked.number))
    });
    assert_eq!(fetch(&registry).unwrap(), BYTES);
    let seen = storage.seen();
    assert_eq!(seen[0].path, "/x?sig=0");
    assert_eq!(seen[1].path, "/x?sig=1");
    assert_eq!(seen[1].header("range"), Some("bytes=4-"));
}

#[test]
fn missing_blob_is_not_found() {
    let fake = Fake::start(|_| Answer::new(404));
    fails(fetch(&fake), Kind::ReferenceNotFound);
    let bad = client(settings(&fake.name())).blob("sha256:../../x", 1, 0);
    assert_eq!(bad.err().unwrap().kind(), Kind::InvalidArgument);
}
