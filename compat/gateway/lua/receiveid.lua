-- Leases one message by its id.
-- ARGV: group, consumer, kind (p or d), id, visibility ms, max concurrency, deployment, peek (1: change nothing)
-- Answer: {status[, number | entry]}; statuses: ok, gone, acknowledged, leased (ms left), delayed (ms left), limited (under lease)
local group, consumer, kind, id = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local visibility, concurrency, deployment, peek = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7], ARGV[8] == '1'
if not peek then mature(100) end
if kind == 'd' then
  local at = redis.call('ZSCORE', delayed, id)
  if at and tonumber(at) > now then return { 'delayed', number(tonumber(at) - now) } end
  id = redis.call('HGET', placed, id)
  if not id then return { 'gone' } end
end
local entry = redis.call('XRANGE', stream, id, id)
if #entry == 0 then return { 'gone' } end
local pairs = entry[1][2]
local expires = tonumber(field(pairs, 'tercet-expires') or '0')
local own = field(pairs, 'tercet-deployment') or ''
if expires > 0 and expires <= now or deployment ~= '' and own ~= deployment then return { 'gone' } end
if peek then return { 'ok', { id, '1', number(now), pairs } } end
local at = position(group)
if not at then
  local failed = create(group, '0')
  if failed then return failed end
  at = '0-0'
end
local h = load(id)
local waiting = redis.call('ZSCORE', aside, own .. '\1' .. padded(id))
if h then
  if h.ahead == 2 then return { 'acknowledged' } end
  if redis.call('ZSCORE', parked, id) then return { 'acknowledged' } end
  local deadline = redis.call('ZSCORE', leases, id)
  if deadline and tonumber(deadline) > now then return { 'leased', number(tonumber(deadline) - now) } end
  local due = redis.call('ZSCORE', nexts, id)
  if due and tonumber(due) > now then return { 'delayed', number(tonumber(due) - now) } end
elseif not waiting and not before(at, id) then
  local pending = redis.call('XPENDING', stream, group, id, id, 1)
  if #pending > 0 then return { 'leased', '1000' } end -- a consumer outside the gateway holds it
  return { 'acknowledged' }
end
if concurrency > 0 then
  local busy = redis.call('ZCOUNT', leases, '(' .. number(now), '+inf')
  if busy >= concurrency then return { 'limited', number(busy) } end
end
if not h then
  h = { count = 0, granted = 0, expires = expires, ahead = before(at, id) and 1 or 0, deployment = own }
  if waiting then redis.call('ZREM', aside, own .. '\1' .. padded(id)) end
end
redis.call('XCLAIM', stream, group, consumer, 0, id, 'FORCE')
return { 'ok', grant(id, pairs, h, visibility) }
