//! Fuzz targets for the messages of the helper protocol, in both directions. `scripts/fuzz` runs
//! them. An input is one message.

use super::protocol::{FROM_HELPER_BYTES_MAX, Job, Order, Reply};
use crate::api::exec::Exit;

/// Maximum length of a reply's text after escaping each of its bytes.
const TEXT_SHOWN_BYTES_MAX: usize = 10 * FROM_HELPER_BYTES_MAX;

/// Decodes a message as the daemon decodes a reply, and checks that its text is bounded and
/// harmless. A guest may have written the message.
pub fn replies(message: &[u8]) {
    match Reply::decode(message) {
        Some(Reply::Failed(_, text)) => {
            assert!(
                text.len() <= TEXT_SHOWN_BYTES_MAX,
                "a text of {} bytes",
                text.len()
            );
            assert!(
                text.chars().all(|c| !c.is_control() && c != '\u{202e}'),
                "a text that a terminal would obey"
            );
        }
        Some(Reply::Exited(Exit::Signal(name))) => {
            assert!(name.bytes().all(|b| b.is_ascii_alphanumeric()), "{name:?}")
        }
        Some(other) => assert_eq!(Reply::decode(&other.encode()), Some(other)),
        None => {}
    }
}

/// Decodes a message as a helper decodes jobs and orders. A helper must accept only what the daemon
/// can send.
pub fn orders(message: &[u8]) {
    if let Some(job) = Job::decode(message) {
        assert_eq!(job.encode(), message);
    }
    if let Some(order) = Order::decode(message) {
        assert_eq!(order.encode(), message);
    }
}
