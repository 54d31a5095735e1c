//! Envelopes. A request is one line; a response is any number of notification lines and one final line.

use super::fault::Fault;
use crate::ids::OpId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Longest line in either direction, with its newline.
pub const FRAME_BYTES_MAX: usize = 1024 * 1024;
/// Most descriptors that come with one request.
pub const FDS_MAX: usize = 4;

/// The JSON-RPC codes. Everything of the domain is [`rpc_code::DOMAIN`]; the stable part is in [`Fault`].
pub mod rpc_code {
    pub const PARSE: i32 = -32700;
    pub const INVALID_REQUEST: i32 = -32600;
    pub const METHOD_NOT_FOUND: i32 = -32601;
    pub const INVALID_PARAMS: i32 = -32602;
    pub const INTERNAL: i32 = -32603;
    pub const DOMAIN: i32 = -32000;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    #[serde(rename = "2.0")]
    V2,
}

/// Descriptors go with the first byte of the line (SCM_RIGHTS).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request<'a> {
    pub jsonrpc: Version,
    /// A number or a string, given back as it came. A request without one is refused.
    #[serde(borrow)]
    pub id: &'a RawValue,
    pub method: std::borrow::Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub params: Option<&'a RawValue>,
    /// For a call that is an operation: stay on the line, stream progress, answer when it has ended. Without
    /// it the answer comes at once: `{"op":"<id>"}`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// Idempotency key of a mutating call: the same key with the same parameters is the same operation for 24 h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<std::borrow::Cow<'a, str>>,
}

/// A line before the final one of a `more` call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Notification {
    pub jsonrpc: Version,
    #[serde(flatten)]
    pub note: Note,
}

impl Notification {
    /// The note as it goes over the connection, with its newline.
    pub fn line(note: Note) -> serde_json::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(&Self { jsonrpc: Version::V2, note })?;
        line.push(b'\n');
        Ok(line)
    }
}

/// What may be told on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
pub enum Note {
    /// The operation has this id.
    Op {
        op: OpId,
    },
    Progress(super::op::Progress),
    /// `vm.create` with `hold`: the VM exists.
    Created(Box<super::vm::Vm>),
    /// `exec.start`: the session can be resized and signalled by this id.
    Session {
        session: crate::ids::SessionId,
    },
    /// `workspace.prepare`: the stream may begin.
    Ready(super::workspace::Ready),
    /// `vm.logs`: a piece of the console.
    Log(super::vm::LogChunk),
    /// `events.watch`: how the VMs stand.
    Snapshot(super::event::Snapshot),
    /// `events.watch`: what a change brought.
    Events(super::event::Events),
    /// `events.watch`: the last note to one who reads too slowly.
    Lagged(super::event::Lagged),
}

/// The final line.
#[derive(Debug, Serialize, Deserialize)]
pub struct Response<R = Box<RawValue>> {
    pub jsonrpc: Version,
    pub id: Box<RawValue>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<R>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RpcError>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RpcError {
    pub code: i32,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Fault>,
}

/// Any line from the daemon, for the client to tell apart.
#[derive(Debug)]
pub enum Line<R = Box<RawValue>> {
    Note(Note),
    Response(Response<R>),
}

/// The members of either kind of line, so that a response is read in one pass: a list of a thousand VMs is half a MiB.
#[derive(Deserialize)]
#[serde(bound(deserialize = "R: Deserialize<'de>"))]
struct AnyLine<'a, R> {
    jsonrpc: Version,
    #[serde(borrow, default)]
    method: Option<std::borrow::Cow<'a, str>>,
    #[serde(default)]
    id: Option<Box<RawValue>>,
    #[serde(default)]
    result: Option<R>,
    #[serde(default)]
    error: Option<RpcError>,
}

impl<R: DeserializeOwned> Line<R> {
    /// Reads one line. Notes of a method that this side does not know are `None`.
    pub fn parse(line: &[u8]) -> serde_json::Result<Option<Self>> {
        const KNOWN: &[&str] = &["op", "progress", "created", "session", "ready", "log", "snapshot", "events", "lagged"];
        let any: AnyLine<'_, R> = serde_json::from_slice(line)?;
        match any.method {
            None => {
                let id = any.id.unwrap_or_else(|| RawValue::NULL.to_owned());
                Ok(Some(Line::Response(Response { jsonrpc: any.jsonrpc, id, result: any.result, error: any.error })))
            }
            Some(m) if KNOWN.contains(&m.as_ref()) => {
                serde_json::from_slice::<Notification>(line).map(|n| Some(Line::Note(n.note)))
            }
            Some(_) => Ok(None),
        }
    }
}
