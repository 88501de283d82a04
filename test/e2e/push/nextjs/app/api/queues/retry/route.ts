// A handler that says itself when a failed message comes again.
import { processOrder } from "@/lib/orders";
import { queue } from "@/lib/queue";
import { signed } from "@/lib/signed";

export const POST = signed(queue.handleCallback(processOrder, { retry: () => ({ afterSeconds: 600 }) }));
