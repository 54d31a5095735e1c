//! Reads lists, which the daemon returns in pages.

use super::{Client, Result};
use crate::api::page::ListCall;
use crate::error::Error;

impl Client {
    /// Reads all pages of a list.
    pub fn list<C: ListCall>(&mut self, request: C::Request) -> Result<Vec<C::Item>> {
        let mut all = Vec::new();
        self.list_pages::<C>(request, &mut |items| all.extend(items))?;
        Ok(all)
    }

    /// Passes the pages of a list to `on_page` one by one. The next page is requested before
    /// `on_page` gets the previous one, so that the daemon and the caller work at the same time.
    pub fn list_pages<C: ListCall>(
        &mut self,
        mut request: C::Request,
        on_page: &mut dyn FnMut(Vec<C::Item>),
    ) -> Result<()> {
        self.ask::<C>(&request)?;
        loop {
            let (items, next) = C::into_page(self.answer::<C>()?);
            let Some(next) = next else {
                on_page(items);
                return Ok(());
            };
            if items.is_empty() {
                let text = format!(
                    "{}: the daemon sent an empty page that is not the last",
                    C::METHOD
                );
                return Err(Error::internal(text).into());
            }
            C::start_after(&mut request, next);
            self.ask::<C>(&request)?;
            on_page(items);
        }
    }
}
