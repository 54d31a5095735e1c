//! Sends orders to a helper while its command runs. The caller's controls become orders.

use super::protocol::Order;
use crate::guest::{Control, Controls};
use crate::host::confine::Channel;
use std::collections::VecDeque;

/// The orders that the helper has not accepted yet. Controls are taken only when no order is
/// queued, so this queue stays short. The caller's own queue is bounded.
#[derive(Default)]
pub(super) struct Orders<'a> {
    pub controls: Option<&'a mut dyn Controls>,
    queue: VecDeque<Order>,
}

impl Orders<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Adds an order and sends what the helper accepts.
    pub(super) fn push(&mut self, order: Order, channel: &Channel) {
        self.queue.push_back(order);
        self.send(channel);
    }

    /// Sends as many orders as the helper accepts now. The others stay queued.
    pub(super) fn send(&mut self, channel: &Channel) {
        while let Some(order) = self.queue.front() {
            match channel.send(&order.encode(), &[]) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return,
                // If the helper is gone, `Session::receive` notices it.
                Ok(()) | Err(_) => drop(self.queue.pop_front()),
            }
        }
    }

    /// Turns the caller's controls into orders, as long as the helper accepts them.
    pub(super) fn take_controls(&mut self, channel: &Channel) {
        while self.queue.is_empty() {
            let Some(control) = self.controls.as_mut().and_then(|c| c.next()) else {
                return;
            };
            let order = match control {
                Control::Resize(size) => Order::Resize(size),
                Control::Signal(name) => Order::Signal(name),
                Control::HangUp => Order::HangUp,
            };
            self.push(order, channel);
        }
    }
}
