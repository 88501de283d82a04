-- Leases messages for a group: those never given out first, in the order of the stream, then those whose lease or
-- retry delay is over, in the order in which they became due.
-- ARGV: group, consumer, max, visibility ms, max concurrency (0: none), start of a new group (0 or $), deployment ("": all),
--       max deliveries (0: no limit), park (1: keep as dead letters)
-- Answer: {entries, ms until something may become due or -1, under lease, limited (1)}
local group, consumer, max, visibility = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local concurrency, start, deployment = tonumber(ARGV[5]), ARGV[6], ARGV[7]
local deliveries, park = tonumber(ARGV[8]), ARGV[9] == '1'
mature(100)
local room, limited = max, 0
if concurrency > 0 then
  local free = concurrency - redis.call('ZCOUNT', leases, '(' .. number(now), '+inf')
  if free < room then room = free end
  if room <= 0 then limited = 1 end
end
local out = {}

-- take reads an entry that the group has on its list, with a native delivery count kept in step for other tools.
local function take(id)
  local got = redis.call('XCLAIM', stream, group, consumer, 0, id)
  if got[1] and got[1][1] then return got[1][2] end
  return nil
end

if deployment ~= '' and room > 0 then
  local waiting = redis.call('ZRANGE', aside, '[' .. deployment .. '\1', '(' .. deployment .. '\2', 'BYLEX', 'LIMIT', 0, room)
  for _, member in ipairs(waiting) do
    local id = unpadded(string.sub(member, #deployment + 2))
    redis.call('ZREM', aside, member)
    local pairs = take(id)
    if pairs then
      local expires = tonumber(field(pairs, 'tercet-expires') or '0')
      if expires > 0 and expires <= now then
        forget(group, id)
      else
        out[#out + 1] = grant(id, pairs, { count = 0, granted = 0, expires = expires, ahead = 0, deployment = deployment }, visibility)
      end
    end
  end
elseif room > 0 then
  local waiting = redis.call('ZRANGE', aside, '-', '+', 'BYLEX', 'LIMIT', 0, room)
  for _, member in ipairs(waiting) do
    local name, id = string.match(member, '^(.*)\1(.*)$')
    id = unpadded(id)
    redis.call('ZREM', aside, member)
    local pairs = take(id)
    if pairs then
      local expires = tonumber(field(pairs, 'tercet-expires') or '0')
      if expires > 0 and expires <= now then
        forget(group, id)
      else
        out[#out + 1] = grant(id, pairs, { count = 0, granted = 0, expires = expires, ahead = 0, deployment = name }, visibility)
      end
    end
  end
end

local looked = 0
while #out < room and looked < 1000 do
  local got = redis.pcall('XREADGROUP', 'GROUP', group, consumer, 'COUNT', room - #out, 'STREAMS', stream, '>')
  if got and got.err then
    if not string.find(got.err, 'NOGROUP', 1, true) then return got end
    local failed = create(group, start)
    if failed then return failed end
    got = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', room - #out, 'STREAMS', stream, '>')
  end
  if not got or #got == 0 then break end
  for _, entry in ipairs(got[1][2]) do
    local id, pairs = entry[1], entry[2]
    looked = looked + 1
    local expires = tonumber(field(pairs, 'tercet-expires') or '0')
    local own = field(pairs, 'tercet-deployment') or ''
    local h = load(id)
    if h and h.ahead == 2 then
      forget(group, id) -- settled through its id before
    elseif h then
      h.ahead = 0 -- given out through its id before
      save(id, h)
    elseif expires > 0 and expires <= now then
      redis.call('XACK', stream, group, id)
    elseif deployment ~= '' and own ~= deployment then
      redis.call('ZADD', aside, 0, own .. '\1' .. padded(id))
    else
      out[#out + 1] = grant(id, pairs, { count = 0, granted = 0, expires = expires, ahead = 0, deployment = own }, visibility)
    end
  end
end

-- Retried ones. Those of other deployments are passed over, a bounded number of them.
local offset = 0
while #out < room and offset < 1000 do
  local due = redis.call('ZRANGE', nexts, '-inf', now, 'BYSCORE', 'LIMIT', offset, room - #out)
  if #due == 0 then break end
  for _, id in ipairs(due) do
    local h = load(id)
    if not h then
      redis.call('ZREM', nexts, id)
    elseif h.expires > 0 and h.expires <= now then
      forget(group, id)
    elseif deployment ~= '' and h.deployment ~= deployment then
      offset = offset + 1
    elseif deliveries > 0 and h.count - h.base >= deliveries then
      if park then
        redis.call('ZADD', parked, now, id)
        redis.call('HSET', why, id, number(h.count) .. ' ' .. number(now) .. ' max_deliveries')
        redis.call('ZREM', nexts, id)
        redis.call('ZREM', leases, id)
      else
        forget(group, id)
      end
    else
      local pairs = take(id)
      if pairs then
        out[#out + 1] = grant(id, pairs, h, visibility)
      else
        forget(group, id)
      end
    end
  end
end

local wait = -1
for _, key in ipairs({ nexts, delayed }) do
  local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  if first[2] then
    local left = math.max(tonumber(first[2]) - now, 0)
    if wait < 0 or left < wait then wait = left end
  end
end
return { out, wait, redis.call('ZCOUNT', leases, '(' .. number(now), '+inf'), limited }
