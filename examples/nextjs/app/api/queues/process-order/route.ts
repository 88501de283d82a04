import { processOrder } from "@/lib/orders";
import { queue } from "@/lib/queue";
import { signed } from "@/lib/signed";

export const POST = signed(queue.handleCallback(processOrder));
