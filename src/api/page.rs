//! Paging of lists, so that no reply exceeds a frame.
//!
//! A list call takes `after` and `limit` and returns items and `next`. Without `next` the list is
//! complete; otherwise the same call with `after` set to `next` returns the following page. An item
//! that exists while all pages are read is listed exactly once. A page may have fewer items than
//! `limit`, because it also ends at [`PAGE_BYTES_MAX`].

use super::Call;
use super::limits::FRAME_BYTES_MAX;
use crate::error::{Error, Result};
use crate::host::text::quoted;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

/// The most items in one page, even if `limit` is higher.
pub const PAGE_ITEMS_MAX: u32 = 1000;
/// The most bytes of JSON in a page of several items. A single item may be larger. The rest of the
/// frame leaves room for that and for the envelope.
pub const PAGE_BYTES_MAX: usize = FRAME_BYTES_MAX / 2;

/// Items that are already JSON, and the cursor of the next page.
pub type RawPage = (Vec<Box<RawValue>>, Option<String>);

/// Takes items until the page is full. Each item comes with its cursor, which becomes `next` if the
/// page ends there. The items are sorted by cursor and start after the request's `after`.
///
/// # Errors
/// `invalid_argument` for a `limit` of zero.
pub fn fill<P: ToString, T: Serialize>(
    limit: Option<u32>,
    items: impl IntoIterator<Item = (P, T)>,
) -> Result<RawPage> {
    if limit == Some(0) {
        return Err(Error::invalid("a page of 0 items was requested")
            .hint("leave `limit` out, or set it to 1 or more"));
    }
    let items_max = limit.map_or(PAGE_ITEMS_MAX, |limit| limit.min(PAGE_ITEMS_MAX)) as usize;
    let (mut page, mut bytes, mut last) = (Vec::new(), 0, None);
    for (place, item) in items {
        let raw = to_raw_value(&item)
            .map_err(|e| Error::internal("serialize an item of a list").with_source(e))?;
        bytes += raw.get().len() + 1;
        if page.len() == items_max || (bytes > PAGE_BYTES_MAX && !page.is_empty()) {
            return Ok((page, last.as_ref().map(P::to_string)));
        }
        page.push(raw);
        last = Some(place);
    }
    Ok((page, None))
}

/// Returns the error for an `after` that no page of this list returned as `next`.
pub fn bad_cursor(after: &str) -> Error {
    Error::invalid(format!(
        "`after` is {}, which no page of this list returned as `next`",
        quoted(after)
    ))
    .hint("leave `after` out to list from the beginning")
}

/// A call that returns a list in pages.
pub trait ListCall: Call {
    type Item;
    fn start_after(request: &mut Self::Request, after: String);
    fn into_page(reply: Self::Reply) -> (Vec<Self::Item>, Option<String>);
}

/// Implements [`ListCall`] for a request with `after` and a reply with `next`.
macro_rules! list_calls {
    ($($call:ident: $member:ident of $item:ty;)*) => {
        $(impl $crate::api::page::ListCall for $call {
            type Item = $item;
            fn start_after(request: &mut Self::Request, after: String) {
                request.after = Some(after);
            }
            fn into_page(reply: Self::Reply) -> (Vec<$item>, Option<String>) {
                (reply.$member, reply.next)
            }
        })*
    };
}
pub(crate) use list_calls;

/// The request for a list without filters.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListRequest {
    /// The cursor of the page: `next` of the previous one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// The most items to return; there may be fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn all_pages(count: u32, limit: Option<u32>, padding: usize) -> (Vec<u32>, usize) {
        let (mut seen, mut pages, mut after) = (Vec::new(), 0, 0);
        loop {
            let items = (after + 1..=count).map(|n| (n, (n, "x".repeat(padding))));
            let (page, next) = fill(limit, items).unwrap();
            let bytes: usize = page.iter().map(|raw| raw.get().len()).sum();
            assert!(bytes < FRAME_BYTES_MAX, "{bytes}");
            seen.extend(
                page.iter()
                    .map(|raw| serde_json::from_str::<(u32, String)>(raw.get()).unwrap().0),
            );
            pages += 1;
            let Some(next) = next else {
                return (seen, pages);
            };
            after = next.parse().unwrap();
        }
    }

    #[test]
    fn pages_hold_each_item_once_within_limits() {
        for (count, limit, padding, pages) in [
            (0, None, 0, 1),
            (1, Some(1), 0, 1),
            (7, Some(3), 0, 3),
            (6, Some(3), 0, 2),
            (2500, None, 0, 3),
            (2500, Some(u32::MAX), 0, 3),
            (40, None, PAGE_BYTES_MAX / 8, 6),
            // Each item that is larger than a page fills one page.
            (3, None, PAGE_BYTES_MAX, 3),
        ] {
            let (seen, found) = all_pages(count, limit, padding);
            assert_eq!(seen, (1..=count).collect::<Vec<_>>());
            assert_eq!(found, pages, "{count} {limit:?} {padding}");
        }
    }

    #[test]
    fn limit_of_zero_is_refused() {
        assert_eq!(
            fill(Some(0), [(1, 1)]).unwrap_err().kind(),
            Kind::InvalidArgument
        );
    }
}
