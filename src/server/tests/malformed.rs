use super::*;

/// Sends a line and checks the answer's id, JSON-RPC code and kind. The connection must stay
/// usable.
#[track_caller]
fn check(sent: impl AsRef<[u8]>, id: Value, code: i32, kind: &str) {
    let f = fixture();
    let mut c = f.client();
    c.send(sent);
    c.send("\n");
    let a = c.answer();
    assert_eq!((a.kind(), &a.id), ((code, kind), &id), "{a:?}");
    let calls = f.probe.calls.load(Ordering::SeqCst);
    c.check_alive();
    if code != rpc::PARAMS && code != rpc::UNKNOWN {
        assert_eq!(calls, 0, "no handler must see it");
    }
}

mod rpc {
    pub(super) const PARSE: i32 = -32700;
    pub(super) const INVALID: i32 = -32600;
    pub(super) const UNKNOWN: i32 = -32601;
    pub(super) const PARAMS: i32 = -32602;
}

#[test]
fn invalid_json_is_parse_error() {
    for bad in [
        "",
        " ",
        "hello",
        "{",
        "{\"jsonrpc\":\"2.0\"",
        "{}}",
        "\u{feff}{}",
        "{\"id\":1,}",
        "nul",
        "{\"id\":01}",
        "{'id':1}",
    ] {
        check(bad, Value::Null, rpc::PARSE, "invalid_request");
    }
    check(
        b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\xfe\"}",
        Value::Null,
        rpc::PARSE,
        "invalid_request",
    );
    check(b"{\"a\0b", Value::Null, rpc::PARSE, "invalid_request");
    check(
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\\ud800\"}",
        Value::Null,
        rpc::PARSE,
        "invalid_request",
    );
    check(
        "{\"jsonrpc\":\"2.0\",\"id\":1e999x}",
        Value::Null,
        rpc::PARSE,
        "invalid_request",
    );
}

#[test]
fn invalid_request_is_rejected() {
    let call = "{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"echo\"}";
    for (bad, id) in [
        ("[]".to_owned(), Value::Null),
        (format!("[{call}]"), Value::Null),
        ("[\"2.0\",1,\"echo\"]".to_owned(), Value::Null),
        ("7".to_owned(), Value::Null),
        ("\"x\"".to_owned(), Value::Null),
        ("null".to_owned(), Value::Null),
        ("{}".to_owned(), Value::Null),
        (
            "{\"jsonrpc\":\"2.0\",\"method\":\"echo\"}".to_owned(),
            Value::Null,
        ),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":null,\"method\":\"echo\"}".to_owned(),
            Value::Null,
        ),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":{},\"method\":\"echo\"}".to_owned(),
            Value::Null,
        ),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":true,\"method\":\"echo\"}".to_owned(),
            Value::Null,
        ),
        (
            format!(
                "{{\"jsonrpc\":\"2.0\",\"id\":\"{}\",\"method\":\"echo\"}}",
                "i".repeat(200)
            ),
            Value::Null,
        ),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":7,\"id\":8,\"method\":\"echo\"}".to_owned(),
            Value::Null,
        ),
        (
            "{\"jsonrpc\":\"1.0\",\"id\":7,\"method\":\"echo\"}".to_owned(),
            json!(7),
        ),
        ("{\"id\":7,\"method\":\"echo\"}".to_owned(), json!(7)),
        ("{\"jsonrpc\":\"2.0\",\"id\":7}".to_owned(), json!(7)),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":5}".to_owned(),
            json!(7),
        ),
        (call.replace('}', ",\"extra\":1}"), json!(7)),
        (call.replace('}', ",\"method\":\"echo\"}"), json!(7)),
        (call.replace('}', ",\"params\":[1]}"), json!(7)),
        (call.replace('}', ",\"params\":\"x\"}"), json!(7)),
        (call.replace('}', ",\"more\":1}"), json!(7)),
        (call.replace('}', ",\"key\":\"\"}"), json!(7)),
        (
            call.replace('}', &format!(",\"key\":\"{}\"}}", "k".repeat(65))),
            json!(7),
        ),
    ] {
        check(bad, id, rpc::INVALID, "invalid_request");
    }
}

#[test]
fn wrong_parameters_are_rejected() {
    let typed = |params: &str| {
        format!("{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"typed\",\"params\":{params}}}")
    };
    for bad in [
        "{}",
        "{\"n\":-1}",
        "{\"n\":1,\"n\":2}",
        "{\"n\":1,\"m\":2}",
        "{\"n\":99999999999999999999999999999999}",
        "{\"n\":\"1\"}",
    ] {
        check(typed(bad), json!(7), rpc::PARAMS, "invalid_argument");
    }
    let value = |params: &str| {
        format!(
            "{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"value\",\"params\":{{\"a\":{params}}}}}"
        )
    };
    for bad in [&"[".repeat(100_000) as &str, "\"\\ud800\"", "1e999"] {
        // The deeply nested input gets its closing brackets, so that only its depth is wrong.
        let bad = if bad.len() > 1000 {
            format!("{bad}{}", "]".repeat(bad.len()))
        } else {
            bad.to_owned()
        };
        check(value(&bad), json!(7), rpc::PARAMS, "invalid_argument");
    }
    check(
        "{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"no.such\"}",
        json!(7),
        rpc::UNKNOWN,
        "method_not_found",
    );
}

#[test]
fn many_keys_and_odd_ids_are_accepted() {
    let f = fixture();
    let mut c = f.client();
    let keys: Vec<_> = (0..60_000).map(|n| format!("\"k{n}\":0")).collect();
    c.send(format!(
        "{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"value\",\"params\":{{{}}}}}\n",
        keys.join(",")
    ));
    assert_eq!(c.answer().result.as_object().unwrap().len(), 60_000);
    c.send("  {\"jsonrpc\" : \"2.0\", \"id\":123456789012345678901234567890,\"method\":\"ec\\u0068o\"} \r\n");
    let mut line = String::new();
    c.reader.read_line(&mut line).unwrap();
    assert_eq!(
        line,
        "{\"jsonrpc\":\"2.0\",\"id\":123456789012345678901234567890,\"result\":{}}\n"
    );
}

/// Returns a request of exactly this length, including its newline.
fn padded(bytes: usize) -> String {
    let empty = "{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"typed\",\"params\":{\"x\":\"\"}}\n";
    empty.replace("\"\"", &format!("\"{}\"", "p".repeat(bytes - empty.len())))
}

#[test]
fn longest_line_is_accepted_and_longer_one_rejected() {
    let f = fixture();
    let mut c = f.client();
    c.send(padded(FRAME_BYTES_MAX));
    assert_eq!(c.answer().kind().0, rpc::PARAMS);
    c.check_alive();
    // The server may hang up before it has read everything.
    let _ = c.stream().write_all(padded(FRAME_BYTES_MAX + 1).as_bytes());
    let a = c.answer();
    assert_eq!(
        (a.kind(), &a.id),
        ((rpc::INVALID, "frame_too_large"), &Value::Null)
    );
    c.check_closed();
    assert_eq!(f.probe.calls.load(Ordering::SeqCst), 2);
}

#[test]
fn endless_line_is_rejected() {
    let f = fixture();
    let mut c = f.client();
    let chunk = vec![b'x'; 64 * 1024];
    // The client would send far more than the limit, but writing fails when the server hangs up.
    let sent = (0..1024)
        .take_while(|_| c.stream().write_all(&chunk).is_ok())
        .count();
    assert!(sent < 100, "the server read {sent} chunks of 64 KiB");
    assert_eq!(c.answer().kind(), (rpc::INVALID, "frame_too_large"));
    c.check_closed();
    f.client().check_alive();
}

#[test]
fn cut_off_line_is_rejected() {
    let f = fixture();
    let mut c = f.client();
    c.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"meth");
    c.stream().shutdown(Shutdown::Write).unwrap();
    assert_eq!(c.answer().kind(), (rpc::INVALID, "invalid_request"));
    c.check_closed();
    let mut c = f.client();
    c.send("{\"half");
    drop(c);
    assert_eq!(f.server.drain(Instant::now() + DEADLINE), 0);
    assert_eq!(f.probe.calls.load(Ordering::SeqCst), 0);
}

#[test]
fn too_long_answer_becomes_error() {
    let f = fixture();
    let mut c = f.client();
    assert_eq!(c.call("big", json!({})).kind(), (-32000, "exhausted"));
    c.check_alive();
}
