//! The envelopes of the protocol. A request is one line. The daemon answers it with any number of
//! notifications and one final line, the response.

use super::fault::Fault;
use crate::ids::OpId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The JSON-RPC error codes. All of fcd's own errors use [`rpc_code::DOMAIN`]; the details are in
/// the [`Fault`].
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

/// A request. Descriptors accompany the first byte of its line (SCM_RIGHTS).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request<'a> {
    pub jsonrpc: Version,
    /// A number or a string, which the response repeats. A request without an id is refused.
    #[serde(borrow)]
    pub id: &'a RawValue,
    pub method: std::borrow::Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub params: Option<&'a RawValue>,
    /// If set, an operation sends progress and replies when it has ended. Otherwise the reply comes
    /// immediately: `{"op":"<id>"}`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// The idempotency key of a mutating call. For 24 hours, the same key with the same parameters
    /// names the same operation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<std::borrow::Cow<'a, str>>,
}

/// A line that the daemon sends before the response of a `more` call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Notification {
    pub jsonrpc: Version,
    #[serde(flatten)]
    pub note: Note,
}

impl Notification {
    /// Renders a note as a line, including the newline.
    pub fn line(note: Note) -> serde_json::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(&Self {
            jsonrpc: Version::V2,
            note,
        })?;
        line.push(b'\n');
        Ok(line)
    }
}

/// The content of a [`Notification`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
pub enum Note {
    /// The id of the operation.
    Op {
        op: OpId,
    },
    Progress(super::op::Progress),
    /// `vm.create` with `hold`: the VM has been created.
    Created(Box<super::vm::Vm>),
    /// `exec.start`: the id for resizing and signalling the session.
    Session {
        session: crate::ids::SessionId,
    },
    /// `workspace.prepare`: the caller may begin to send the stream.
    Ready(super::workspace::Ready),
    /// `vm.logs`: a piece of the console's output.
    Log(super::vm::LogChunk),
    /// `events.watch`: the current state of the VMs.
    Snapshot(super::event::Snapshot),
    /// `events.watch`: the events of a change.
    Events(super::event::Events),
    /// `events.watch`: the last note to a client that reads too slowly.
    Lagged(super::event::Lagged),
}

/// The final line of a call.
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

/// A line from the daemon: a notification or the response.
#[derive(Debug)]
pub enum Line<R = Box<RawValue>> {
    Note(Note),
    Response(Response<R>),
}

/// The members of both kinds of line. A single type allows parsing a line in one pass, which
/// matters because a list of a thousand VMs takes half a MiB.
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
    /// Parses one line. Returns None for a note whose method this client does not know.
    pub fn parse(line: &[u8]) -> serde_json::Result<Option<Self>> {
        const KNOWN: &[&str] = &[
            "op", "progress", "created", "session", "ready", "log", "snapshot", "events", "lagged",
        ];
        let any: AnyLine<'_, R> = serde_json::from_slice(line)?;
        match any.method {
            None => {
                let id = any.id.unwrap_or_else(|| RawValue::NULL.to_owned());
                Ok(Some(Line::Response(Response {
                    jsonrpc: any.jsonrpc,
                    id,
                    result: any.result,
                    error: any.error,
                })))
            }
            Some(m) if KNOWN.contains(&m.as_ref()) => {
                serde_json::from_slice::<Notification>(line).map(|n| Some(Line::Note(n.note)))
            }
            Some(_) => Ok(None),
        }
    }
}
