//! Parses request lines, rejects invalid ones before a handler sees them, and formats errors for
//! the wire.

use super::peer::Peer;
use crate::api::Fault;
use crate::api::frame::{Request, Response, RpcError, Version, rpc_code};
use crate::api::limits::FRAME_BYTES_MAX;
use crate::error::{Error, Kind};
use crate::host::text::quoted;
use crate::ids::OpId;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::os::fd::OwnedFd;

/// The longest idempotency key, in bytes.
pub(super) const KEY_LEN_MAX: usize = 64;
/// The longest id of a request, in bytes of JSON. Every answer repeats the id.
const ID_LEN_MAX: usize = 128;

/// A call as it was received.
pub struct IncomingCall<'a> {
    pub method: &'a str,
    /// A JSON object, or `{}` if the request had no params.
    pub params: &'a str,
    /// True if the caller wants notes before the answer.
    pub more: bool,
    pub key: Option<&'a str>,
    /// The descriptors that came with the request. They are close-on-exec, but may be of any kind,
    /// so check them before use. Dropping them closes them.
    pub fds: Vec<OwnedFd>,
    pub peer: Peer,
}

impl IncomingCall<'_> {
    /// Returns the error for invalid params (-32602, kind `invalid_argument`): a wrong type, an
    /// unknown or duplicate member, or too much nesting.
    pub(super) fn invalid_params(&self, source: serde_json::Error) -> CallError {
        let error =
            Error::invalid(format!("parameters of {}", quoted(self.method))).with_source(source);
        CallError {
            code: rpc_code::INVALID_PARAMS,
            fault: Fault::from(error.hint("see fcctl rpc --help")),
        }
    }

    /// Takes exactly `N` descriptors.
    ///
    /// # Errors
    /// `invalid_request` if there are more or fewer.
    pub fn take_fds<const N: usize>(&mut self) -> Result<[OwnedFd; N], CallError> {
        let fds = std::mem::take(&mut self.fds);
        let had = fds.len();
        fds.try_into().map_err(|_| {
            let text = format!(
                "{} takes {N} descriptors, but got {had}",
                quoted(self.method)
            );
            CallError::from(Error::new(Kind::InvalidRequest, text))
        })
    }
}

/// The result of a call, or its error.
pub type CallResult = Result<Box<RawValue>, CallError>;

/// A JSON-RPC code and its [`Fault`].
#[derive(Clone, Debug, PartialEq)]
pub struct CallError {
    pub code: i32,
    pub fault: Fault,
}

impl CallError {
    /// Returns the reply to a call of a method that this daemon does not have.
    pub fn unknown_method(method: &str) -> Self {
        Error::new(
            Kind::MethodNotFound,
            format!("no method {}", quoted(method)),
        )
        .hint("see fcctl version on both sides")
        .into()
    }

    /// Adds the operation that failed.
    #[must_use]
    pub fn with_op(mut self, op: OpId) -> Self {
        self.fault.op = Some(op);
        self
    }
}

impl From<&Error> for CallError {
    fn from(e: &Error) -> Self {
        let code = match e.kind() {
            Kind::InvalidRequest | Kind::FrameTooLarge => rpc_code::INVALID_REQUEST,
            Kind::MethodNotFound => rpc_code::METHOD_NOT_FOUND,
            Kind::Internal => rpc_code::INTERNAL,
            _ => rpc_code::DOMAIN,
        };
        Self {
            code,
            fault: Fault::from(e),
        }
    }
}

impl From<Error> for CallError {
    fn from(e: Error) -> Self {
        Self::from(&e)
    }
}

/// Converts the fault of a failed operation.
impl From<Fault> for CallError {
    fn from(fault: Fault) -> Self {
        let code = if fault.code == crate::error::Code::Internal {
            rpc_code::INTERNAL
        } else {
            rpc_code::DOMAIN
        };
        Self { code, fault }
    }
}

/// An invalid request, with its id if that can be repeated in the answer.
pub(super) struct Refused {
    pub(super) id: Option<Box<RawValue>>,
    pub(super) error: CallError,
}

pub(super) fn parse(line: &[u8]) -> Result<Request<'_>, Box<Refused>> {
    let bad_json = |text: String| {
        let error = Error::new(Kind::InvalidRequest, text).hint("send one JSON object on one line");
        Box::new(Refused {
            id: None,
            error: CallError {
                code: rpc_code::PARSE,
                fault: Fault::from(error),
            },
        })
    };
    let text = std::str::from_utf8(line)
        .map_err(|e| bad_json(format!("the request is not UTF-8: {e}")))?;
    let text = text.trim_matches([' ', '\t', '\r', '\n']);
    if text.is_empty() {
        return Err(bad_json("the request is empty".into()));
    }
    let refused = |text: String| {
        let error =
            Error::new(Kind::InvalidRequest, text).hint("see JSON-RPC 2.0 and fcctl rpc --help");
        Box::new(Refused {
            id: usable_id(line),
            error: error.into(),
        })
    };
    let is_json = || serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok();
    // serde's derived deserializers also accept an array for a struct.
    if !text.starts_with('{') && is_json() {
        let what = if text.starts_with('[') {
            "batches are not supported"
        } else {
            "it is not an object"
        };
        return Err(refused(format!("invalid request: {what}")));
    }
    let request: Request<'_> = serde_json::from_str(text).map_err(|e| match e.classify() {
        serde_json::error::Category::Data if is_json() => refused(format!("invalid request: {e}")),
        _ => bad_json(format!("the request is not JSON: {e}")),
    })?;
    if !id_is_usable(request.id) {
        return Err(refused(format!(
            "invalid request: the id must be a number or a string of at most {ID_LEN_MAX} bytes"
        )));
    }
    if request.params.is_some_and(|p| !p.get().starts_with('{')) {
        return Err(refused("invalid request: params must be an object".into()));
    }
    if request
        .key
        .as_ref()
        .is_some_and(|k| k.is_empty() || k.len() > KEY_LEN_MAX)
    {
        return Err(refused(format!(
            "invalid request: the key must have 1 to {KEY_LEN_MAX} bytes"
        )));
    }
    Ok(request)
}

fn id_is_usable(id: &RawValue) -> bool {
    let text = id.get();
    text.len() <= ID_LEN_MAX
        && text.starts_with(|c: char| c == '"' || c == '-' || c.is_ascii_digit())
}

/// Finds the id of a request that is otherwise invalid. Returns None if there is no id that can be
/// repeated.
fn usable_id(line: &[u8]) -> Option<Box<RawValue>> {
    #[derive(Deserialize)]
    struct OnlyId {
        id: Box<RawValue>,
    }
    if !line.trim_ascii_start().starts_with(b"{") {
        return None;
    }
    serde_json::from_slice::<OnlyId>(line)
        .ok()
        .map(|o| o.id)
        .filter(|id| id_is_usable(id))
}

/// Formats a response line, which always fits into a frame.
pub(super) fn response_line(id: Option<&RawValue>, result: CallResult) -> Vec<u8> {
    let line = encode(id, result);
    if line.len() <= FRAME_BYTES_MAX {
        return line;
    }
    let text = format!(
        "the answer has {} bytes, but a line may have only {FRAME_BYTES_MAX}",
        line.len()
    );
    encode(
        id,
        Err(Error::new(Kind::Exhausted, text)
            .hint("request less data")
            .into()),
    )
}

/// Formats an error that does not belong to a request.
pub(super) fn error_line(error: &CallError) -> Vec<u8> {
    response_line(None, Err(error.clone()))
}

/// The usual size of a response without its result.
const ENVELOPE_BYTES: usize = 256;

fn encode(id: Option<&RawValue>, result: CallResult) -> Vec<u8> {
    let id = id.map_or_else(|| RawValue::NULL.to_owned(), RawValue::to_owned);
    let (result, error) = match result {
        Ok(value) => (Some(value), None),
        Err(e) => (
            None,
            Some(RpcError {
                code: e.code,
                message: e.fault.message.clone(),
                data: Some(e.fault),
            }),
        ),
    };
    let response = Response {
        jsonrpc: Version::V2,
        id,
        result,
        error,
    };
    // Reserve the size at once. Otherwise a growing buffer would copy a long list about ten times.
    let mut line =
        Vec::with_capacity(response.result.as_ref().map_or(0, |r| r.get().len()) + ENVELOPE_BYTES);
    serde_json::to_writer(&mut line, &response).expect("a response has only maps with string keys");
    line.push(b'\n');
    line
}
