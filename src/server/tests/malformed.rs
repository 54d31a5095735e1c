use super::*;

/// What is sent, the answer's id, JSON-RPC code and kind; the connection lives on.
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
        assert_eq!(calls, 0, "no handler saw it");
    }
}

mod rpc {
    pub const PARSE: i32 = -32700;
    pub const INVALID: i32 = -32600;
    pub const UNKNOWN: i32 = -32601;
    pub const PARAMS: i32 = -32602;
}

#[test]
fn not_json() {
    for bad in
        ["", " ", "hello", "{", "{\"jsonrpc\":\"2.0\"", "{}}", "\u{feff}{}", "{\"id\":1,}", "nul", "{\"id\":01}", "{'id':1}"]
    {
        check(bad, Value::Null, rpc::PARSE, "invalid_request");
    }
    check(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\xfe\"}", Value::Null, rpc::PARSE, "invalid_request");
    check(b"{\"a\0b", Value::Null, rpc::PARSE, "invalid_request");
    check("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\\ud800\"}", Value::Null, rpc::PARSE, "invalid_request");
    check("{\"jsonrpc\":\"2.0\",\"id\":1e999x}", Value::Null, rpc::PARSE, "invalid_request");
}

#[test]
fn no_request() {
    let call = "{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"echo\"}";
    for (bad, id) in [
        ("[]".to_owned(), Value::Null),
        (format!("[{call}]"), Value::Null),
        ("[\"2.0\",1,\"echo\"]".to_owned(), Value::Null),
        ("7".to_owned(), Value::Null),
        ("\"x\"".to_owned(), Value::Null),
        ("null".to_owned(), Value::Null),
        ("{}".to_owned(), Value::Null),
        ("{\"jsonrpc\":\"2.0\",\"method\":\"echo\"}".to_owned(), Value::Null),
        ("{\"jsonrpc\":\"2.0\",\"id\":null,\"method\":\"echo\"}".to_owned(), Value::Null),
        ("{\"jsonrpc\":\"2.0\",\"id\":{},\"method\":\"echo\"}".to_owned(), Value::Null),
        ("{\"jsonrpc\":\"2.0\",\"id\":true,\"method\":\"echo\"}".to_owned(), Value::Null),
        (format!("{{\"jsonrpc\":\"2.0\",\"id\":\"{}\",\"method\":\"echo\"}}", "i".repeat(200)), Value::Null),
        ("{\"jsonrpc\":\"2.0\",\"id\":7,\"id\":8,\"method\":\"echo\"}".to_owned(), Value::Null),
        ("{\"jsonrpc\":\"1.0\",\"id\":7,\"method\":\"echo\"}".to_owned(), json!(7)),
        ("{\"id\":7,\"method\":\"echo\"}".to_owned(), json!(7)),
        ("{\"jsonrpc\":\"2.0\",\"id\":7}".to_owned(), json!(7)),
        ("{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":5}".to_owned(), json!(7)),
        (call.replace('}', ",\"extra\":1}"), json!(7)),
        (call.replace('}', ",\"method\":\"echo\"}"), json!(7)),
        (call.replace('}', ",\"params\":[1]}"), json!(7)),
        (call.replace('}', ",\"params\":\"x\"}"), json!(7)),
        (call.replace('}', ",\"more\":1}"), json!(7)),
        (call.replace('}', ",\"key\":\"\"}"), json!(7)),
        (call.replace('}', &format!(",\"key\":\"{}\"}}", "k".repeat(65))), json!(7)),
    ] {
        check(bad, id, rpc::INVALID, "invalid_request");
    }
}

#[test]
fn wrong_parameters() {
    let typed = |params: &str| format!("{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"typed\",\"params\":{params}}}");
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
    let value = |params: &str| format!("{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"value\",\"params\":{{\"a\":{params}}}}}");
    for bad in [&"[".repeat(100_000) as &str, "\"\\ud800\"", "1e999"] {
        // Deep, but closed.
        let bad = if bad.len() > 1000 { format!("{bad}{}", "]".repeat(bad.len())) } else { bad.to_owned() };
        check(value(&bad), json!(7), rpc::PARAMS, "invalid_argument");
    }
    check("{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"no.such\"}", json!(7), rpc::UNKNOWN, "method_not_found");
}

#[test]
fn many_keys_and_odd_ids_are_fine() {
    let f = fixture();
    let mut c = f.client();
    let keys: Vec<_> = (0..60_000).map(|n| format!("\"k{n}\":0")).collect();
    c.send(format!("{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"value\",\"params\":{{{}}}}}\n", keys.join(",")));
    assert_eq!(c.answer().result.as_object().unwrap().len(), 60_000);
    c.send("  {\"jsonrpc\" : \"2.0\", \"id\":123456789012345678901234567890,\"method\":\"ec\\u0068o\"} \r\n");
    let mut line = String::new();
    c.reader.read_line(&mut line).unwrap();
    assert_eq!(line, "{\"jsonrpc\":\"2.0\",\"id\":123456789012345678901234567890,\"result\":{}}\n");
}

/// A request of exactly so many bytes, with its newline.
fn padded(bytes: usize) -> String {
    let empty = "{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"typed\",\"params\":{\"x\":\"\"}}\n";
    empty.replace("\"\"", &format!("\"{}\"", "p".repeat(bytes - empty.len())))
}

#[test]
fn the_longest_line_and_one_byte_more() {
    let f = fixture();
    let mut c = f.client();
    c.send(padded(FRAME_BYTES_MAX));
    assert_eq!(c.answer().kind().0, rpc::PARAMS);
    c.check_alive();
    // The server may hang up before it has all of it.
    let _ = c.stream().write_all(padded(FRAME_BYTES_MAX + 1).as_bytes());
    let a = c.answer();
    assert_eq!((a.kind(), &a.id), ((rpc::INVALID, "frame_too_large"), &Value::Null));
    c.check_closed();
    assert_eq!(f.probe.calls.load(Ordering::SeqCst), 2);
}

#[test]
fn a_line_without_end() {
    let f = fixture();
    let mut c = f.client();
    let chunk = vec![b'x'; 64 * 1024];
    // Far more than the limit: writing fails once the server has hung up.
    let sent = (0..1024).take_while(|_| c.stream().write_all(&chunk).is_ok()).count();
    assert!(sent < 100, "{sent} chunks of 64 KiB were taken");
    assert_eq!(c.answer().kind(), (rpc::INVALID, "frame_too_large"));
    c.check_closed();
    f.client().check_alive();
}

#[test]
fn a_line_that_is_cut_off() {
    let f = fixture();
    let mut c = f.client();
    c.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"meth");
    c.stream().shutdown(Shutdown::Write).unwrap();
    assert_eq!(c.answer().kind(), (rpc::INVALID, "invalid_request"));
    c.check_closed();
    let mut c = f.client();
    c.send("{\"half");
    drop(c);
    assert_eq!(f.server.drain(Instant::now() + PATIENCE), 0);
    assert_eq!(f.probe.calls.load(Ordering::SeqCst), 0);
}

#[test]
fn an_answer_that_fits_no_line() {
    let f = fixture();
    let mut c = f.client();
    assert_eq!(c.call("big", json!({})).kind(), (-32000, "exhausted"));
    c.check_alive();
}
